# SPDX-License-Identifier: Apache-2.0
"""A task's metric of a model in training: that of the command on its predictions, the same on all ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_megatron.data.parquet import open_examples
from lora_megatron.data.tokenizer import load_tokenizer
from lora_megatron.errors import ConfigError
from lora_megatron.evaluation.live import load_adapter, open_model
from lora_megatron.evaluation.rows import instances_of
from lora_megatron.evaluation.settings import Decoding
from lora_megatron.evaluation.task_metric import task_metric
from lora_megatron.parallel.groups import Layout
from tests.evaluation.commands import run_each, save_rows
from tests.evaluation.conftest import Reader
from tests.evaluation.test_commands import evaluated
from tests.pool import Pool

LAYOUTS = {"one": (1, Layout()), "tp2-dp2": (4, Layout(tensor=2)), "pp2": (2, Layout(pipeline=2))}
METRICS = {"text": "rouge_l", "mnli": "accuracy"}


def measured(files: Reader, data: dict[str, Path], layout: Layout) -> list[float]:
    """On every rank."""
    model = open_model(files.base, layout=layout)
    load_adapter(model, files.adapter)
    for chunk in model.chunks:
        chunk.train()
    rows = {
        task: instances_of(open_examples(path, with_references=True), group=task == "text")
        for task, path in data.items()
    }
    settings, tokenizer = Decoding(max_new_tokens=12), load_tokenizer(str(files.base))
    found = [
        task_metric(
            model.chunks, rows[task], task=task, metric=metric, settings=settings, tokenizer=tokenizer, batch_size=3
        )
        for task, metric in METRICS.items()
    ]
    assert all(chunk.training for chunk in model.chunks)
    with pytest.raises(ConfigError, match="no metric 'bleurt' of task text here: there are bleu"):
        task_metric(
            model.chunks, rows["text"][:1], task="text", metric="bleurt", settings=settings, tokenizer=tokenizer
        )
    return found


def test_the_metric_is_that_of_the_command(pool: Pool, reader: Callable[[str], Reader], tmp_path: Path) -> None:
    files = reader("llama")
    first = {"text": files.data, "mnli": files.labelled}
    commands = [evaluated(files, tmp_path / task, "--task", task, "--data", str(first[task])) for task in METRICS]
    assert pool.run(1, run_each, commands=commands, store=str(tmp_path / "store")) == [[0, 0]]
    contexts = [instance.context for instance in instances_of(open_examples(files.data), group=False)]
    data = {}
    for task, other in (("text", "neutral"), ("mnli", "contradiction")):
        lines = (tmp_path / task / "predictions.jsonl").read_text().splitlines()
        said = [json.loads(line)["prediction"] for line in lines]
        # References that some predictions share, so that no metric is 0 or 100 for everything.
        rows = [(c, [s if i % 2 else other]) for i, (c, s) in enumerate(zip(contexts, said, strict=True)) if s]
        data[task] = save_rows(tmp_path / f"{task}-rows", rows)
    again = [
        evaluated(files, tmp_path / f"{task}-again", "--task", task, "--data", str(data[task])) for task in METRICS
    ]
    assert pool.run(1, run_each, commands=again, store=str(tmp_path / "store-2")) == [[0, 0]]
    wanted = [
        json.loads((tmp_path / f"{task}-again" / "scores.json").read_text())["scores"][metric]
        for task, metric in METRICS.items()
    ]
    assert 0 < wanted[0] < 100
    for world, layout in LAYOUTS.values():
        ranks = pool.run(world, measured, files=files, data=data, layout=layout)
        assert ranks == [wanted] * world

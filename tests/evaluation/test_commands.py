# SPDX-License-Identifier: Apache-2.0
"""`generate` and `evaluate` say what transformers says, whatever the layout; labels are judged as by brute force."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_megatron.data.examples import prompt_ids
from lora_megatron.data.tokenizer import load_tokenizer
from lora_megatron.metrics.tasks import TASKS
from tests.evaluation.commands import CONTEXTS, END, NEW, continued, lines_of, run_each, save_rows
from tests.evaluation.conftest import Reader
from tests.huggingface.models import model_class
from tests.pool import Pool

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "tp2": (2, ["parallel.tensor=2"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "dp2-tp2-sp": (4, ["parallel.tensor=2", "parallel.sequence=true"]),
}
GREEDY = ["--task", "text"]
SEARCH = {"num_beams": 10, "length_penalty": 0.8}
PAPER = ["--task", "e2e"]  # the paper's GPT-2: its beam search bans repetitions of the continuation alone
BEAMS = ["--task", "text", "--beams", "4", "--length-penalty", "0.9", "--no-repeat-ngram", "2", "--early-stopping"]


def model_of(folder: Path, name: str) -> Any:
    return model_class(name).from_pretrained(folder, dtype=torch.float32).eval()


@functools.cache
def theirs(reader: Reader, name: str, folder: Path, **settings: Any) -> list[list[int]]:
    """transformers' tokens after each context, a prompt at a time."""
    tokenizer, model = load_tokenizer(str(reader.base)), model_of(folder, name)
    return [continued(model, prompt_ids(c, tokenizer), end=tokenizer.eos_id, **settings) for c in CONTEXTS]


def evaluated(reader: Reader, out: Path, *words: str, adapter: bool = True) -> list[str]:
    """The command line; few resamples, as the scores are not what is tested."""
    common = ["--data", str(reader.data), "--out", str(out), "--bootstrap", "5", "--max-new-tokens", str(NEW)]
    chosen = ["--adapter", str(reader.adapter)] if adapter else []
    return ["evaluate", str(reader.config), *common, *chosen, *words]


def check_texts(reader: Reader, out: Path, wanted: Sequence[list[int]]) -> None:
    tokenizer = load_tokenizer(str(reader.base))
    lines = lines_of(out / "predictions.jsonl")
    assert [line["id"] for line in lines] == [f"row-{row}" for row in range(len(CONTEXTS))]
    assert [line["prediction"] for line in lines] == [tokenizer.decode(tokens) for tokens in wanted]
    assert [line["tokens"] for line in lines] == [len(tokens) for tokens in wanted]


CASES = [*(("gpt2", layout) for layout in LAYOUTS), *(("llama", layout) for layout in ("one", "tp2", "pp2"))]
ON_FOUR = pytest.param("llama", "dp2-tp2-sp", marks=pytest.mark.slow)  # its labels are scored there in every run


@pytest.mark.parametrize(("name", "layout"), [*CASES, ON_FOUR])
def test_predictions_are_those_of_transformers(
    pool: Pool, reader: Callable[[str], Reader], tmp_path: Path, name: str, layout: str
) -> None:
    files, (world, overrides) = reader(name), LAYOUTS[layout]
    kinds = {"greedy": GREEDY, "beams": BEAMS}
    commands = [
        evaluated(files, tmp_path / f"{kind}-{adapter}", *words, "--batch-size", "3", *overrides, adapter=adapter)
        for kind, words in kinds.items()
        for adapter in (True, False)
    ]
    assert pool.run(world, run_each, commands=commands, store=str(tmp_path / "store")) == [[0] * 4] * world
    beams = {"num_beams": 4, "length_penalty": 0.9, "no_repeat_ngram_size": 2, "early_stopping": True}
    texts: list[list[int]] = []
    for kind, settings in {"greedy": {}, "beams": beams}.items():
        for adapter, folder in ((True, files.merged), (False, files.base)):
            wanted = theirs(files, name, folder, **settings)
            check_texts(files, tmp_path / f"{kind}-{adapter}", wanted)
            texts += wanted
    ended = [len(text) < NEW for text in texts]
    assert any(ended), "some must end by themselves"
    assert not all(ended), "and some not"


def test_the_paper_s_search_is_the_default_of_its_tasks(
    pool: Pool, reader: Callable[[str], Reader], tmp_path: Path
) -> None:
    files = reader("gpt2")
    bans = {"default": (4, []), "pairs": (2, ["--no-repeat-ngram", "2"]), "none": (0, ["--no-repeat-ngram", "0"])}
    commands = [evaluated(files, tmp_path / name, *PAPER, *words) for name, (_, words) in bans.items()]
    assert pool.run(1, run_each, commands=commands, store=str(tmp_path / "store")) == [[0, 0, 0]]
    settings = json.loads((tmp_path / "default" / "evaluation.json").read_text())
    said = {"beams": 10, "length_penalty": 0.8, "no_repeat_ngram": 4, "no_repeat_prompt": False}
    assert {name: settings[name] for name in said} == said
    for name, (ban, _) in bans.items():
        check_texts(files, tmp_path / name, theirs(files, "gpt2", files.merged, ban=ban, **SEARCH))
    assert theirs(files, "gpt2", files.merged, ban=2, **SEARCH) != theirs(files, "gpt2", files.merged, ban=0, **SEARCH)


def brute_force(reader: Reader, name: str, labels: Sequence[str]) -> list[dict[str, float]]:
    """Log-likelihoods of whole targets, each in a forward pass of its own through transformers."""
    tokenizer, model = load_tokenizer(str(reader.base)), model_of(reader.merged, name)
    found = []
    for context in CONTEXTS:
        prompt, row = prompt_ids(context, tokenizer), {}
        for label in labels:
            target = [*tokenizer.encode(label), tokenizer.eos_id]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
            row[label] = float(logits.log_softmax(-1)[range(len(target)), target].double().sum())
        found.append(row)
    return found


@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_labels_have_the_likelihoods_of_brute_force(
    pool: Pool, reader: Callable[[str], Reader], tmp_path: Path, name: str
) -> None:
    files, labels = reader(name), TASKS["mnli"].labels
    wanted = brute_force(files, name, labels)
    for layout, (world, overrides) in LAYOUTS.items():
        out = tmp_path / layout
        of_labels = ["--task", "mnli", "--data", str(files.labelled)]
        command = evaluated(files, out, *of_labels, "--batch-size", "3", *overrides)
        statuses = pool.run(world, run_each, commands=[command], store=str(tmp_path / f"{layout}.store"))
        assert statuses == [[0]] * world
        for line, row in zip(lines_of(out / "predictions.jsonl"), wanted, strict=True):
            assert line["log_likelihoods"] == pytest.approx(row, abs=2e-3)  # sums of up to 14 in fp32
            assert line["prediction"] == max(row, key=lambda label: row[label])


def test_scores_are_written_and_shown(
    reader: Callable[[str], Reader], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = reader("llama")
    folder = ["--data", str(files.data.parent)]  # its test.parquet
    (status,) = run_alone([*evaluated(files, tmp_path / "out", *GREEDY, "--limit", "5"), *folder])
    assert status == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["instances"] == len(lines_of(tmp_path / "out" / "predictions.jsonl")) == 5
    assert set(scores["scores"]) == set(TASKS["text"].metrics)
    low, high = scores["intervals"]["bleu"]
    assert low <= scores["scores"]["bleu"] <= high
    shown = capsys.readouterr()
    assert "95% interval" in shown.out
    assert all(name in shown.out for name in TASKS["text"].metrics)
    assert f"with the adapter {files.adapter} on 5 rows of text" in shown.err


def test_what_a_chat_template_rendered_is_read_as_in_training(
    reader: Callable[[str], Reader], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its special tokens are special tokens, no line end follows, and references are compared without them."""
    files, contexts = reader("llama"), [f"a{END}bc", f"{END}four"]
    tokenizer, model = load_tokenizer(str(files.base)), model_of(files.merged, "llama")
    wanted = [continued(model, tokenizer.encode_rendered(c), end=tokenizer.eos_id) for c in contexts]
    said = [tokenizer.decode(tokens) for tokens in wanted]
    rows = [(c, [text + END]) for c, text in zip(contexts, said, strict=True)]
    data = save_rows(tmp_path / "rendered", rows, rendered_for=tokenizer.fingerprint)
    out = tmp_path / "out"
    assert run_alone([*evaluated(files, out, *GREEDY), "--data", str(data)]) == [0]
    assert [line["prediction"] for line in lines_of(out / "predictions.jsonl")] == said
    assert json.loads((out / "scores.json").read_text())["scores"]["exact_match"] == 100
    again = [*evaluated(files, tmp_path / "mnli", "--task", "mnli"), "--data", str(data)]
    other = save_rows(tmp_path / "other", rows, rendered_for="another")
    capsys.readouterr()
    assert run_alone(again, [*evaluated(files, tmp_path / "new", *GREEDY), "--data", str(other)]) == [3, 3]
    errors = capsys.readouterr().err
    assert "the labels of mnli stand alone" in errors
    assert "was rendered by the chat template of another tokenizer" in errors


def run_alone(*commands: list[str]) -> list[int]:
    """In this process, each in a world of its own."""
    from lora_megatron.__main__ import main

    return [main(command) for command in commands]


def test_generate_prints_or_writes_continuations(
    pool: Pool, reader: Callable[[str], Reader], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, tokenizer = reader("llama"), load_tokenizer(str(reader("llama").base))
    wanted = [tokenizer.decode(tokens) for tokens in theirs(files, "llama", files.merged)]
    (tmp_path / "prompts.txt").write_text("\n".join(CONTEXTS) + "\n")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"context": c}) + "\n" for c in CONTEXTS))
    common = ["generate", str(files.config), "--adapter", str(files.adapter), "--max-new-tokens", str(NEW)]
    files_of = {kind: (str(tmp_path / f"prompts.{kind}"), str(tmp_path / f"{kind}.out")) for kind in ("txt", "jsonl")}
    commands = [[*common, "--prompts", file, "--out", out, "parallel.tensor=2"] for file, out in files_of.values()]
    assert pool.run(2, run_each, commands=commands, store=str(tmp_path / "store")) == [[0, 0], [0, 0]]
    for kind in ("txt", "jsonl"):
        assert [line["prompt"] for line in lines_of(tmp_path / f"{kind}.out")] == list(CONTEXTS)
        assert [line["prediction"] for line in lines_of(tmp_path / f"{kind}.out")] == wanted
    capsys.readouterr()  # what importing transformers' friends may say
    assert run_alone([*common, "--prompt", CONTEXTS[1], "--prompt", CONTEXTS[0]]) == [0]
    assert capsys.readouterr().out == f"{CONTEXTS[1]}\n  -> {wanted[1]}\n\n{CONTEXTS[0]}\n  -> {wanted[0]}\n\n"

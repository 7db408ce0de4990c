# SPDX-License-Identifier: Apache-2.0
"""The commands on a GPU in fp32: greedy and beam search equal transformers', labels those of brute force.

python -m pytest tests/evaluation/test_gpu.py -m gpu
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lora_megatron.__main__ import main
from lora_megatron.metrics.tasks import TASKS
from tests.evaluation.commands import lines_of
from tests.evaluation.conftest import Reader
from tests.evaluation.test_commands import BEAMS, GREEDY, brute_force, check_texts, evaluated, theirs
from tests.pool import Pool

one_gpu = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def nccl() -> Iterator[Pool]:
    """One process on the first GPU."""
    pool = Pool(1, backend="nccl")
    yield pool
    pool.close()


def run_on_gpu(commands: Sequence[Sequence[str]], store: str) -> list[int]:
    """As `run_each`, with products in full fp32."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    statuses = []
    for index, command in enumerate(commands):
        if not dist.is_initialized():
            dist.init_process_group("nccl", init_method=f"file://{store}-{index}", rank=0, world_size=1)
        statuses.append(main(list(command)))
    return statuses


@pytest.mark.parametrize("name", [pytest.param(name, marks=one_gpu) for name in ("gpt2", "llama")])
def test_predictions_on_a_gpu(nccl: Pool, reader: Callable[[str], Reader], tmp_path: Path, name: str) -> None:
    files, labels = reader(name), TASKS["mnli"].labels
    kinds = {"greedy": GREEDY, "beams": BEAMS, "mnli": ["--task", "mnli", "--data", str(files.labelled)]}
    commands = [evaluated(files, tmp_path / kind, *words, "--batch-size", "3") for kind, words in kinds.items()]
    assert nccl.run(1, run_on_gpu, commands=commands, store=str(tmp_path / "store")) == [[0, 0, 0]]
    check_texts(files, tmp_path / "greedy", theirs(files, name, files.merged))
    beams = {"num_beams": 4, "length_penalty": 0.9, "no_repeat_ngram_size": 2, "early_stopping": True}
    check_texts(files, tmp_path / "beams", theirs(files, name, files.merged, **beams))
    for line, row in zip(
        lines_of(tmp_path / "mnli" / "predictions.jsonl"), brute_force(files, name, labels), strict=True
    ):
        assert line["log_likelihoods"] == pytest.approx(row, abs=5e-3)  # sums of up to 14 in fp32, on another device

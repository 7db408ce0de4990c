# SPDX-License-Identifier: Apache-2.0
"""A bench on a GPU: the allocator's numbers against the plan, and a method that really runs out of memory.

python -m pytest tests/bench/test_gpu.py -m gpu -s
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench.benches import bench, report_of, row_of
from tests.commands.runs import Outcome
from tests.pool import Pool

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# Wide enough for activations and weights to stand out from cuBLAS's workspaces.
TREE: dict[str, Any] = {
    "model": {"preset": "gpt3-1.3b", "num_layers": 6, "vocab_size": 50257},
    "data": {"sequence_length": 1024, "micro_batch_size": 4, "global_batch_size": 8},
    "train": {"precision": "bf16"},
}


@pytest.fixture(scope="module")
def nccl() -> Iterator[Pool]:
    """One process on one GPU."""
    pool = Pool(1, backend="nccl")
    yield pool
    pool.close()


def test_plan_and_allocator_agree(nccl: Pool, tmp_path: Path) -> None:
    assert nccl.run(1, bench, tree=TREE, out=str(tmp_path), steps=4, warm_up=2) == [Outcome()]
    report = report_of(tmp_path)
    for method in ("lora", "full"):
        row = row_of(report, method, 6)
        (memory,) = row["memory_by_rank"]
        print(
            method, {key: row[key] for key in ("step_seconds", "share_of_ceiling", "plan_error", "left_bytes")}, memory
        )
        assert memory["reserved"] >= memory["peak"] > memory["weights"] + memory["gradients"] + memory["optimizer"]
        for kind in ("weights", "trained", "gradients", "optimizer"):
            assert abs(row["plan_error"][kind]) < 0.05, kind
        assert abs(row["plan_error"]["peak"]) < 0.10
        assert row["left_bytes"] < 128 * 2**20  # cuBLAS's workspaces
        assert 0.05 < row["share_of_ceiling"] < 1.05
    assert report["ratios"][0]["speed"] > 1
    assert report["ratios"][0]["peak_memory"] < 1


@contextlib.contextmanager
def half_of_what_full_needs(memory: int) -> Iterator[None]:
    torch.cuda.set_per_process_memory_fraction(memory / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def bench_with_memory(memory: int, out: str) -> Outcome:
    tree = {**TREE, "data": {"sequence_length": 512, "micro_batch_size": 1, "global_batch_size": 1}}
    methods = ("full", "lora")
    return bench(tree, out, methods=methods, layers=6, under=lambda: half_of_what_full_needs(memory))


def test_a_method_that_runs_out_of_memory_leaves_it_to_the_next(nccl: Pool, tmp_path: Path) -> None:
    """Six layers of width 2048 need some 7 GB with all trained, and 1 GB with LoRA."""
    assert nccl.run(1, bench_with_memory, memory=4 * 2**30, out=str(tmp_path)) == [Outcome()]
    report = report_of(tmp_path)
    assert row_of(report, "full", 6)["out_of_memory"].startswith("out of memory; plan: ")
    assert row_of(report, "lora", 6)["steps"] == 2

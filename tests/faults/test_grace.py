# SPDX-License-Identifier: Apache-2.0
"""Every group has the timeout that was asked for, and the user knows what a signal leaves time for."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lora_megatron.commands import grace
from lora_megatron.commands.grace import Grace
from lora_megatron.commands.summary import Run
from lora_megatron.config import parse_config
from lora_megatron.parallel import groups
from lora_megatron.parallel.groups import Layout
from tests.commands.runs import Outcome, attempt, checkpoint_of, make_tree
from tests.pool import Pool


def _timeouts(layout: Layout, minutes: float) -> dict[int, timedelta]:
    default = {id(group) for group in dist.distributed_c10d._world.pg_map}  # the pool's own
    groups.build_mesh(layout, seed=1, timeout_minutes=minutes)
    made = [group for group in dist.distributed_c10d._world.pg_map if id(group) not in default]
    return {index: g._get_backend(torch.device("cpu")).options._timeout for index, g in enumerate(made)}


def test_the_timeout_reaches_every_group(pool: Pool) -> None:
    for layout in (Layout(tensor=2, pipeline=2), Layout(tensor=2), Layout()):
        for found in pool.run(4, _timeouts, layout=layout, minutes=1.5):
            assert len(found) > 5
            assert set(found.values()) == {timedelta(seconds=90)}


class _FakeRun:
    def __init__(self, seconds: float) -> None:
        self.config = parse_config({"run": {"grace_seconds": seconds}})


def _grace(seconds: float, said: list[str]) -> Grace:
    run: Any = _FakeRun(seconds)
    return Grace(run, said.append)


def test_what_a_signal_leaves_time_for_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grace, "grace_of_torchrun", lambda version: None)
    said: list[str] = []
    watch = _grace(60, said)
    watch.announce(36 * 2**20)
    assert len(said) == 1
    assert "a checkpoint (about 36.0 MiB) after the step under way, then status 75" in said[0]
    assert said[0].endswith("run.grace_seconds = 60")
    watch.check(50, None)  # no save was measured yet
    watch.check(50, 10)
    assert len(said) == 1
    watch.check(50, 11)
    watch.check(500, 11)
    assert len(said) == 2
    assert "a step takes 50.0 s, a save 11.0 s, together more than the 60 s between" in said[1]
    assert "raise run.grace_seconds and the scheduler's lead time" in said[1]


def test_torchrun_allows_less_than_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grace, "grace_of_torchrun", lambda version: 30.0)
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    said: list[str] = []
    watch = _grace(60, said)
    watch.announce(1)
    remedy = "start with launch/torchrun.sh, which waits, or set TORCH_ELASTIC_SHUTDOWN_TIMEOUT=60"
    assert said[0].endswith(f"torchrun kills 30 s after it ({remedy}), although run.grace_seconds = 60")
    watch.check(20, 11)
    assert "together more than the 30 s" in said[1]
    assert remedy in said[1]
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    watch = _grace(60, said)
    watch.announce(1)
    assert "SHUTDOWN_TIMEOUT" not in said[2]  # 2.11 knows no such variable


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_size_that_is_announced_is_that_of_the_checkpoint(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    sizes = []

    def checkpoint_bytes(run: Run) -> int:
        sizes.append(grace.checkpoint_bytes(run))
        return sizes[-1]

    monkeypatch.setattr("lora_megatron.commands.train.checkpoint_bytes", checkpoint_bytes)
    tree = make_tree(corpus, tmp_path / "run", train={"steps": 1}, method={"name": method})
    assert attempt(tree) == Outcome()
    files = [path.read_bytes() for path in checkpoint_of(tmp_path / "run", 1).glob("*.safetensors")]
    headers = sum(8 + int.from_bytes(data[:8], "little") for data in files)
    assert sum(map(len, files)) - headers == sizes[0]

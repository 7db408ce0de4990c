# SPDX-License-Identifier: Apache-2.0
"""A rank that hangs ends the job with status 6 and is named; so is the loss of one that was killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lora_megatron.data.batches import BatchSource
from lora_megatron.errors import OutOfMemoryAlone
from lora_megatron.parallel.hang import Peer, explain_hang, show_ranks
from lora_megatron.parallel.peers import is_lost_contact, loss_as_error
from lora_megatron.parallel.watchdog import Watchdog
from lora_megatron.training import loop
from tests.commands.runs import Tree, losses_of, make_tree, names_in, status_of
from tests.faults.ranks import Ranks, train_ranks

HANG_MINUTES = 0.15
FOR_EVER = 1000.0


def hang(victim: int, kind: str) -> None:
    """At the fourth step rank `victim` stops itself, or sleeps where it makes its data or steps its optimizer."""
    if int(os.environ["RANK"]) != victim:
        return
    original_step, original_data, original_judge = loop.train_step, BatchSource.microbatch, loop.judge
    step = 0

    def train_step(trainer: Any) -> Any:
        nonlocal step
        step = trainer.step + 1
        if kind == "stop" and step == 4:
            os.kill(os.getpid(), signal.SIGSTOP)
        return original_step(trainer)

    def microbatch(self: BatchSource, first_sample: int) -> Any:
        time.sleep(FOR_EVER if kind == "data" and step == 4 else 0)
        return original_data(self, first_sample)

    def judge(*arguments: Any) -> Any:
        time.sleep(FOR_EVER if kind == "judge" and step == 4 else 0)
        return original_judge(*arguments)

    loop.train_step, loop.judge = train_step, judge
    BatchSource.microbatch = microbatch  # type: ignore[method-assign]


CASES: list[tuple[Tree, int, str, str]] = [
    ({"tensor": 2}, 1, "stop", "rank 1 does not run (stopped, killed, or the machine is gone)"),
    ({"pipeline": 2}, 0, "stop", "rank 0 does not run (stopped, killed, or the machine is gone)"),
    ({"tensor": 2}, 1, "data", "rank 1 hangs in step 4, data"),
    ({"pipeline": 2}, 1, "data", "rank 1 hangs in step 4, data"),
    ({}, 0, "judge", "no rank is behind the others: their stacks tell what they wait for"),
]


@pytest.fixture(scope="module")
def hanging(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[Path, Ranks]]]:
    """All of them at once: they do nothing but wait."""
    with ExitStack() as stack:
        jobs = []
        for parallel, victim, kind, _ in CASES:
            folder = tmp_path_factory.mktemp("hanging")
            run = folder / "run"
            tree = make_tree(corpus, run, parallel=parallel, run={"dir": str(run), "hang_minutes": HANG_MINUTES})
            ranks = train_ranks(tree, world=2, folder=folder, before=partial(hang, victim, kind))
            jobs.append((run, stack.enter_context(ranks)))
        yield jobs


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{kind} {parallel}" for parallel, _, kind, _ in CASES])
def test_a_rank_that_hangs_is_named(hanging: list[tuple[Path, Ranks]], case: int) -> None:
    (run, ranks), (_, victim, kind, named) = hanging[case], CASES[case]
    waiting = [rank for rank in (0, 1) if rank != victim or kind != "stop"]
    assert ranks.wait(*waiting), ranks.logs()
    ranks.kill(victim)  # whom nothing else can end
    statuses = ranks.statuses()
    said = ranks.log(0) + ranks.log(1)
    assert [statuses[rank] for rank in waiting] == [6] * len(waiting), said
    lines = [line for line in said.splitlines() if "error:" in line]
    assert len(lines) == 1, said
    assert f"error: no progress for {HANG_MINUTES} min: {named}; last: rank" in lines[0]
    assert "in step 4" in lines[0]
    assert "start again with run.resume=auto" in lines[0]
    assert "Traceback" not in said
    status = status_of(run)
    assert (status["state"], status["exit_status"]) == ("failed", 6)
    assert named in status["error"]
    stacks = {name: (run / "stacks" / name).read_text() for name in names_in(run / "stacks")}
    assert sorted(stacks) == [f"rank-{rank}.txt" for rank in waiting]
    assert all("in train_step" in text for text in stacks.values())


def test_a_slow_phase_with_progress_is_no_hang(corpus: Path, tmp_path: Path) -> None:
    """Each microbatch takes a quarter of the time allowed, the step and the evaluation more than all of it."""
    run = tmp_path / "run"
    sections: dict[str, Tree] = {"train": {"steps": 1, "save_every": 1}, "run": {"dir": str(run), "hang_minutes": 0.03}}
    with train_ranks(make_tree(corpus, run, **sections), world=1, folder=tmp_path, before=_slow_data) as ranks:
        assert ranks.statuses() == [0], ranks.logs()
    assert "stacks" not in names_in(run)
    assert ".heartbeats" not in names_in(run)


def _slow_data() -> None:
    original = BatchSource._collate

    def collate(*arguments: Any) -> Any:
        time.sleep(0.45)
        return original(*arguments)

    BatchSource._collate = collate  # type: ignore[method-assign]


def _wait_for_step(ranks: Ranks, run: Path, step: int) -> None:
    ranks.wait_until(lambda: (run / "metrics.jsonl").exists() and step in losses_of(run))


@pytest.mark.parametrize(("parallel", "victim"), [({"tensor": 2}, 1), ({"pipeline": 2}, 0), ({}, 0)], ids=str)
def test_who_loses_a_peer_says_so_in_a_line(corpus: Path, tmp_path: Path, parallel: Tree, victim: int) -> None:
    run = tmp_path / "run"
    tree = make_tree(corpus, run, parallel=parallel, train={"steps": 100_000, "save_every": 0})
    with train_ranks(tree, world=2, folder=tmp_path) as ranks:
        _wait_for_step(ranks, run, 3)
        ranks.kill(victim)
        statuses = ranks.statuses()
        said = ranks.log(1 - victim)
    assert statuses[victim] == -signal.SIGKILL
    assert statuses[1 - victim] == 6, said
    assert "error: lost contact with another rank" in said
    assert "start again with run.resume=auto" in said
    assert "Traceback" not in said
    status = status_of(run)
    assert (status["state"], status["exit_status"]) == ("failed", 6)
    assert "lost contact with another rank" in status["error"]


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711"), True),
        (RuntimeError("Gloo: Timed out waiting 1800000ms for recv operation to complete"), True),
        (
            dist.DistBackendError("NCCL error: remote process exited or there was a network error, ncclRemoteError"),
            True,
        ),
        (dist.DistNetworkError("Connection reset by peer"), True),
        (dist.DistBackendError("NCCL error: invalid usage (run with NCCL_DEBUG=WARN for details)"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (AssertionError("Connection closed by peer"), False),
    ],
)
def test_a_bug_is_not_taken_for_a_lost_rank(error: BaseException, is_lost: bool) -> None:
    assert is_lost_contact(error) is is_lost


def peer(step: int, count: int, phase: str) -> Peer:
    return Peer(tick=1, step=step, count=count, phase=phase, changed=0.0)


def test_the_rank_behind_is_blamed_in_worlds_of_any_size() -> None:
    peers = {rank: peer(9, 5, "model") for rank in range(100)}
    blame = partial(explain_hang, world_size=100, seconds=900, in_order=True)
    assert "no rank is behind" in blame(peers, peers)
    assert "15 min: rank 7 hangs in step 8, save" in blame({**peers, 7: peer(8, 50, "save")}, peers)
    assert "rank 7 hangs in step 9, model" in blame({**peers, 7: peer(9, 3, "model")}, peers)
    assert "ranks 3-4, 99 do not run" in blame(peers, set(range(99)) - {3, 4})
    late = {**peers, 7: peer(9, 5, "data")}
    assert "rank 7 hangs in step 9, data" in explain_hang(late, late, world_size=100, seconds=900, in_order=False)
    assert "the disk of run.dir does not answer" in blame({}, set(range(100)))
    everywhere = {rank: peer(rank, 0, "model") for rank in range(100)}
    assert "rank 0 hangs in step 0, model" in blame(everywhere, everywhere)
    assert blame(everywhere, everywhere).endswith("rank 7 in step 7, model, and 92 other places")


def test_ranks_in_words() -> None:
    assert show_ranks([3]) == "rank 3"
    assert show_ranks([0, 1, 2, 5]) == "ranks 0-2, 5"


@pytest.mark.parametrize(
    ("changed", "age", "gets_on"),
    [
        (12.0, 1.0, True),  # it spoke a moment ago, and had just made progress
        (12.0, 11.0, False),  # it lives and waits, as this rank does
        (5.0, 0.0, False),  # what stands in its file is old: it may be stopped
    ],
)
def test_a_rank_that_waits_for_a_busy_one_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: float, age: float, gets_on: bool
) -> None:
    """One rank writes a large file, with a beat a block; the others stand in a collective and have none."""
    dog = Watchdog(tmp_path, rank=0, world_size=2, hang_seconds=10.0, in_order=True, record=lambda message: None)
    monkeypatch.setattr(dog, "_observed_since", 5.0)
    peers = {rank: Peer(1, 3, 0, "save", changed, age) for rank in (1,)}
    monkeypatch.setattr(dog, "_peers", {0: Peer(1, 3, 0, "save", 12.0, 0.0), **peers})
    assert dog._another_gets_on(now=13.0) is gets_on


def test_running_out_of_gpu_memory_is_a_line_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by the rank itself, which then ends: the others may wait for it."""
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."
    with pytest.raises(OutOfMemoryAlone, match=r"^rank 3 is out of GPU memory .*Tried.*recompute") as told:  # noqa: SIM117
        with loss_as_error():
            raise torch.OutOfMemoryError(text)
    assert (told.value.exit_status, told.value.told_by) == (2, "rank")
    assert "total capacity" not in str(told.value)

# SPDX-License-Identifier: Apache-2.0
"""A process that dies while it saves, or a disk that fills up, costs what was not saved and nothing else.

Each victim is a process of its own, forked from one that has imported everything; it dies by SIGKILL at the named
point of the save of step 4, when step 2 is safe.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lora_megatron.checkpoint import adapter, folder, state
from lora_megatron.checkpoint.folder import read_manifest
from lora_megatron.commands import recording
from lora_megatron.commands import train as command
from lora_megatron.errors import CheckpointError
from lora_megatron.measure.metrics import MetricsWriter
from tests.commands.runs import Outcome, Tree, attempt, checkpoint_of, losses_of, make_tree, names_in, status_of
from tests.pool import Pool

SAVE_TO_HIT = 4
# The function whose call is the point in time, and whether the process dies before it or after it.
POINTS: dict[str, tuple[Any, str, str]] = {
    "before any write": (folder, "_prepare", "before"),
    "an empty temporary": (folder, "_prepare", "after"),
    "before the state": (state, "write_stage_file", "before"),
    "after the state": (state, "write_stage_file", "after"),
    "after the adapter's part": (state, "write_adapter_part", "after"),
    "before the parts are joined": (state, "join_adapter_parts", "before"),
    "while the parts are joined": (adapter, "write_json", "before"),
    "before the manifest": (folder, "write_json", "before"),
    "before the rename": (folder.os, "rename", "before"),
    "after the rename": (folder.os, "rename", "after"),
}
WHOLE = {"after the rename"}


def die() -> None:
    """No handler, no cleanup, no flush."""
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(tree: Tree, point: str, rank: int, world: int, victim: int, store: str) -> None:
    """Train; on rank `victim`, die at `point` of the save of step 4."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    module, name, when = POINTS[point]
    original, save = getattr(module, name), recording.save_checkpoint

    def deadly(*arguments: Any, **named: Any) -> Any:
        if when == "before":
            die()
        result = original(*arguments, **named)
        die()
        return result

    def save_checkpoint(*arguments: Any, **named: Any) -> Any:
        if named["progress"].step == SAVE_TO_HIT and rank == victim:
            setattr(module, name, deadly)
        return save(*arguments, **named)

    recording.save_checkpoint = save_checkpoint
    attempt(tree)


@pytest.fixture(scope="module")
def forks() -> ForkServerContext:
    """Processes that start with torch and megatron-core imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.commands.test_interrupted_save"])
    return context


def kill_at(point: str, forks: ForkServerContext, tree: Tree, folder: Path, world: int, victim: int) -> None:
    """Run the world until its victim is dead; who is left may not wait for ever."""
    store = str(folder / "store")
    processes = [
        forks.Process(target=train_and_die, args=(tree, point, rank, world, victim, store)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    processes[victim].join(timeout=100)
    assert processes[victim].exitcode == -signal.SIGKILL, f"not killed at {point!r}: {processes[victim].exitcode}"
    for process in processes:
        process.join(timeout=20)
        if process.is_alive():
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the run that nobody interrupts."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert attempt(make_tree(corpus, run)) == Outcome()
    return losses_of(run)


def check_recovery(run: Path, tree: Tree, undisturbed: dict[int, float], *, whole: bool) -> None:
    """Step 2 is good, step 4 is whole or absent, and the run goes on to the same losses without a trace."""
    assert read_manifest(checkpoint_of(run, 2))["step"] == 2
    named = [name for name in names_in(run / "checkpoints") if not name.startswith(".tmp-")]
    assert named == (["step-00000002", "step-00000004"] if whole else ["step-00000002"])
    for name in named:
        read_manifest(run / "checkpoints" / name)
    assert status_of(run)["state"] == "running"
    assert attempt({**tree, "run": {"dir": str(run), "resume": "auto"}, "parallel": {}}) == Outcome()
    assert losses_of(run) == pytest.approx(undisturbed, rel=1e-6)
    assert names_in(run / "checkpoints") == ["step-00000004", "step-00000006"]
    assert status_of(run)["state"] == "done"
    assert not list(run.rglob(".tmp-*"))


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_of_a_save(
    forks: ForkServerContext, corpus: Path, tmp_path: Path, undisturbed: dict[int, float], point: str
) -> None:
    tree = make_tree(corpus, tmp_path / "run")
    kill_at(point, forks, tree, tmp_path, world=1, victim=0)
    check_recovery(tmp_path / "run", tree, undisturbed, whole=point in WHOLE)


@pytest.mark.parametrize(("point", "victim"), [("before the state", 1), ("after the adapter's part", 0)])
def test_a_kill_of_one_of_two_ranks(
    forks: ForkServerContext, corpus: Path, tmp_path: Path, undisturbed: dict[int, float], point: str, victim: int
) -> None:
    tree = make_tree(corpus, tmp_path / "run", parallel={"tensor": 2})
    kill_at(point, forks, tree, tmp_path, world=2, victim=victim)
    # The survivor's failed collective is not a user's error, but its status is written as one that failed.
    run = tmp_path / "run"
    assert status_of(run)["state"] in ("running", "failed")
    assert names_in(run / "checkpoints")[-1] == "step-00000002"
    assert attempt({**tree, "run": {"dir": str(run), "resume": "auto"}, "parallel": {}}) == Outcome()
    assert losses_of(run) == pytest.approx(undisturbed, rel=1e-5)
    assert names_in(run / "checkpoints") == ["step-00000004", "step-00000006"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond `size` bytes: what a full disk looks like from inside."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def train_with_full_disk(tree: Tree, size: int, victim: int) -> Outcome:
    """Train; rank `victim` finds the disk full at the save of step 4."""
    original = recording.save_checkpoint

    def save(*arguments: Any, **named: Any) -> Any:
        full = named["progress"].step == SAVE_TO_HIT and dist.get_rank() == victim
        with largest_file(size if full else 2**40):
            return original(*arguments, **named)

    recording.save_checkpoint = save  # type: ignore[assignment]
    try:
        return attempt(tree)
    finally:
        recording.save_checkpoint = original


@pytest.mark.parametrize(
    ("parallel", "world", "victim"), [({}, 1, 0), ({"tensor": 2}, 2, 0), ({"pipeline": 2}, 2, 1)], ids=str
)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_disk_that_fills_up_during_a_save(
    pool: Pool, corpus: Path, tmp_path: Path, parallel: Tree, world: int, victim: int, share: float
) -> None:
    run = tmp_path / "run"
    first = make_tree(corpus, run, parallel=parallel, train={"steps": 2})
    assert pool.run(world, attempt, tree=first) == [Outcome()] * world
    state_file = f"state-{victim + 1 if 'pipeline' in parallel else 1:05d}-of-{parallel.get('pipeline', 1):05d}"
    size = int(share * (checkpoint_of(run, 2) / f"{state_file}.safetensors").stat().st_size)
    before = {path.name: path.read_bytes() for path in checkpoint_of(run, 2).iterdir()}
    more = {**make_tree(corpus, run, parallel=parallel), "run": {"dir": str(run), "resume": "auto"}}
    outcomes = pool.run(world, train_with_full_disk, tree=more, size=size, victim=victim)
    assert len(set(outcomes)) == 1
    assert outcomes[0].status == 4
    assert "\n" not in outcomes[0].message
    assert "cannot write" in outcomes[0].message
    assert "free some space" in outcomes[0].message
    assert names_in(run / "checkpoints") == ["step-00000002"]
    assert {path.name: path.read_bytes() for path in checkpoint_of(run, 2).iterdir()} == before
    status = status_of(run)
    assert (status["state"], status["exit_status"]) == ("failed", 4)
    assert "cannot write" in status["error"]
    assert pool.run(world, attempt, tree=more) == [Outcome()] * world
    assert list(losses_of(run)) == [1, 2, 3, 4, 5, 6]
    assert names_in(run / "checkpoints") == ["step-00000004", "step-00000006"]


def _no_space(*arguments: Any, **named: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _set(owner: Any, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(owner, name, _no_space)


@pytest.mark.parametrize(
    "fill",
    [_set(MetricsWriter, "write"), _set(command, "write_report"), _set(command.run_folder, "write_text")],
    ids=["metrics", "report", "config.yaml"],
)
def test_a_full_disk_met_by_other_files_is_one_line_too(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fill: Callable[[pytest.MonkeyPatch], None]
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        fill(patched)
        outcome = attempt(make_tree(corpus, run))
    assert outcome == Outcome(
        4, f"cannot write {run}: No space left on device; free some space or choose another run.dir"
    )
    assert status_of(run)["state"] == "failed"
    assert attempt({**make_tree(corpus, run), "run": {"dir": str(run), "resume": "auto"}}) == Outcome()
    assert list(losses_of(run)) == [1, 2, 3, 4, 5, 6]


def test_a_folder_of_checkpoints_that_vanishes_is_named(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = folder._publish

    def vanish(temporary: Path, *arguments: Any) -> None:
        for path in temporary.iterdir():
            path.unlink()
        temporary.rmdir()
        original(temporary, *arguments)

    monkeypatch.setattr(folder, "_publish", vanish)
    outcome = attempt(make_tree(corpus, tmp_path / "run"))
    assert outcome.status == CheckpointError.exit_status
    assert "cannot write" in outcome.message
    assert names_in(tmp_path / "run" / "checkpoints") == []

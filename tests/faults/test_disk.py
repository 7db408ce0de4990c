# SPDX-License-Identifier: Apache-2.0
"""A disk that fills up, turns read-only or vanishes under a checkpoint ends the run in one line on all ranks.

The checkpoints before it stay as they were, nothing half-written remains, and with room again the run goes on to the
same bits.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lora_megatron.checkpoint import state
from lora_megatron.commands import saving
from lora_megatron.commands import train as command
from lora_megatron.measure.metrics import MetricsWriter
from lora_megatron.strict_safetensors import SafetensorsWriter
from tests.commands.runs import Outcome, Tree, attempt, checkpoint_of, losses_of, make_tree, names_in, status_of
from tests.faults.file_limit import largest_file
from tests.faults.ranks import Ranks, train_ranks
from tests.faults.recovery import LAYOUTS, Undisturbed, check_recovery, named_checkpoints, tree_of

HIT = 4


def check_one_line(ranks: Ranks, run: Path, words: str) -> None:
    """All ranks end with status 4 and rank 0 says why in one line, which is that of status.json."""
    assert set(ranks.statuses()) == {4}, ranks.logs()
    (line,) = [line for line in ranks.log().splitlines() if line.startswith("error: ")]
    assert words in line
    status = status_of(run)
    assert (status["state"], status["exit_status"], f"error: {status['error']}") == ("failed", 4, line)


def train_until_it_fails(tree: Tree, layout: str, folder: Path, words: str, before: Callable[[], None]) -> None:
    """Also check what the failure leaves."""
    run = Path(tree["run"]["dir"])
    with train_ranks(tree, world=LAYOUTS[layout][0], folder=folder, before=before) as ranks:
        check_one_line(ranks, run, words)
    assert named_checkpoints(run) == [checkpoint_of(run, 2).name]
    assert names_in(run / "checkpoints") == [checkpoint_of(run, 2).name]
    assert list(losses_of(run))[-1] in (4, 5, 6)  # in the background it shows at a later step, and before the next save


def when_saving(action: Callable[[], None], rank: str) -> None:
    """Let `action` happen on a rank when the save of step 4 begins."""
    save = saving.save_checkpoint

    def save_checkpoint(*arguments: Any, **named: Any) -> Any:
        if named["progress"].step == HIT and os.environ["RANK"] == rank:
            action()
        return save(*arguments, **named)

    saving.save_checkpoint = save_checkpoint


def limit_files(size: int) -> None:
    """No file of this process grows beyond `size`, while it writes tensors: a disk that is full, seen from inside."""
    write = state.save_tensors

    def save_tensors(*arguments: Any, **named: Any) -> Any:
        with largest_file(size):
            return write(*arguments, **named)

    state.save_tensors = save_tensors


MORE_FILES = [("PP2", 1, 0.01), ("PP2", 1, 0.5), ("TP2", 0, 0.01), ("TP2", 0, 0.5), ("TP2", 0, 0.99)]
MORE_DISKS = [("PP2", 0.5), ("TP2", 0.01), ("TP2", 0.5), ("TP2", 0.99)]
"""Layout, and the share of a file or of a checkpoint that still can be written: two minutes for the same code."""


@pytest.mark.parametrize(
    ("layout", "victim", "share"),
    [("PP2", 0, 0.99), ("PP2", 1, 0.99), *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_FILES)],
)
def test_a_file_that_cannot_grow(
    corpus: Path, tmp_path: Path, undisturbed: Undisturbed, layout: str, victim: int, share: float
) -> None:
    """Synchronously: the limit is the whole process's, and must not hit what training writes meanwhile."""
    expected, run = undisturbed(layout), tmp_path / "run"
    tree = tree_of(layout, corpus, run, train={"async_save": False})
    size = int(share * state_file_bytes(layout, victim, undisturbed.folder / layout))
    spoil = partial(when_saving, partial(limit_files, size), str(victim))
    train_until_it_fails(tree, layout, tmp_path, "File too large; free some space", spoil)
    check_recovery(tree, layout, expected, folder=tmp_path)


def state_file_bytes(layout: str, victim: int, run: Path) -> int:
    stages = 2 if layout == "PP2" else 1
    name = f"state-{(victim if stages == 2 else 0) + 1:05d}-of-{stages:05d}.safetensors"
    return (checkpoint_of(run, 8) / name).stat().st_size


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of `size` bytes at `folder`; skips where none can be mounted."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True, capture_output=True)


def blocks_of(folder: Path) -> int:
    """What a folder takes on a disk of pages of 4096 bytes."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.iterdir())


@pytest.mark.parametrize(
    ("layout", "share"),
    [("PP2", 0.01), ("PP2", 0.99), *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_DISKS)],
)
def test_a_disk_that_is_full_while_training_goes_on(
    corpus: Path, tmp_path: Path, undisturbed: Undisturbed, layout: str, share: float
) -> None:
    expected, run = undisturbed(layout), tmp_path / "run"
    one = blocks_of(checkpoint_of(undisturbed.folder / layout, 8))
    tree = tree_of(layout, corpus, run)
    folder = run / "checkpoints"
    with small_disk(tmp_path / "disk", 8 * one):
        run.mkdir()
        (run / "status.json").write_text('{"state": "failed"}')  # so that what stands there already is a run's
        folder.symlink_to(tmp_path / "disk")
        tree["run"]["resume"] = "auto"
        room = partial(remount, tmp_path / "disk", f"size={int((1 + share) * one)}")
        train_until_it_fails(
            tree, layout, tmp_path, "No space left on device; free some", partial(when_saving, room, "0")
        )
        remount(tmp_path / "disk", f"size={8 * one}")
        check_recovery(tree, layout, expected, folder=tmp_path)


@pytest.mark.parametrize("async_save", [True, False], ids=["async", "sync"])
def test_a_disk_that_turns_read_only(corpus: Path, tmp_path: Path, undisturbed: Undisturbed, async_save: bool) -> None:
    expected, run = undisturbed("PP2"), tmp_path / "run"
    tree = tree_of("PP2", corpus, run, train={"async_save": async_save})
    with small_disk(tmp_path / "disk", 2**24):
        run.mkdir()
        (run / "status.json").write_text('{"state": "failed"}')
        (run / "checkpoints").symlink_to(tmp_path / "disk")
        tree["run"]["resume"] = "auto"
        spoil = partial(when_saving, partial(remount, tmp_path / "disk", "ro"), "0")
        train_until_it_fails(tree, "PP2", tmp_path, "Read-only file system; free some space", spoil)
        remount(tmp_path / "disk", "rw")
        check_recovery(tree, "PP2", expected, folder=tmp_path)


def vanish(folder: str) -> None:
    """Delete the folder under way, or all checkpoints, when the first file is written and the second is not."""
    write = state.save_tensors

    def save_tensors(path: Path, *arguments: Any) -> Any:
        receipt = write(path, *arguments)
        doomed = path.parent if folder == "temporary" else path.parent.parent
        while doomed.exists():  # another rank may write into it meanwhile, which ends one attempt
            shutil.rmtree(doomed, ignore_errors=True)
        return receipt

    state.save_tensors = save_tensors


@pytest.mark.parametrize("folder", ["temporary", "checkpoints"])
@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_folder_that_vanishes(corpus: Path, tmp_path: Path, folder: str, victim: str) -> None:
    run = tmp_path / "run"
    tree = tree_of("PP2", corpus, run)
    spoil = partial(when_saving, partial(vanish, folder), victim)
    with train_ranks(tree, world=2, folder=tmp_path, before=spoil) as ranks:
        check_one_line(ranks, run, f" {checkpoint_of(run, 4).parent}/")
    left = names_in(run / "checkpoints") if (run / "checkpoints").exists() else []
    assert left == (["step-00000002"] if folder == "temporary" else [])


def corrupt_what_is_written() -> None:
    """A disk that keeps something else than it was given."""
    original = SafetensorsWriter.close

    def close_and_change(self: SafetensorsWriter) -> None:
        original(self)
        with open(self.path, "r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            last = stream.read(1)
            stream.seek(-1, os.SEEK_END)
            stream.write(bytes([last[0] ^ 1]))

    SafetensorsWriter.close = close_and_change  # type: ignore[method-assign]


def test_a_disk_that_keeps_something_else_is_found_out(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    spoil = partial(when_saving, corrupt_what_is_written, "0")
    words = "does not read back as it was written"
    train_until_it_fails(tree_of("alone", corpus, run), "alone", tmp_path, words, spoil)


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

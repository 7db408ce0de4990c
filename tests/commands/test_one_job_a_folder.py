# SPDX-License-Identifier: Apache-2.0
"""A run folder has one job at a time, is nobody else's folder, and says what became of the last job, come what may."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lora_megatron.commands import recording
from lora_megatron.commands import train as command
from lora_megatron.commands.run_lock import LOCK_NAME, RunLock
from lora_megatron.errors import ConfigError
from lora_megatron.measure import atomic
from tests.commands.runs import Outcome, Tree, attempt, make_corpus, make_tree, names_in, status_of
from tests.pool import Pool

HOLD = """
import sys, time
from pathlib import Path
from lora_megatron.commands.run_lock import RunLock
RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_second_job_is_told_who_is_there_and_touches_nothing(corpus: Path, tmp_path: Path, resume: str) -> None:
    run = tmp_path / "run"
    assert attempt(make_tree(corpus, run)) == Outcome()
    assert LOCK_NAME not in names_in(run)
    tree = make_tree(corpus, run, run={"dir": str(run), "resume": resume}, train={"steps": 8})
    command = [sys.executable, "-c", HOLD, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        outcome = attempt(tree)
        after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        holder.kill()
    assert outcome.status == 2
    assert f"run.dir = {run} is in use by process {holder.pid} on {socket.gethostname()}" in outcome.message
    assert after == before
    again = attempt({**tree, "run": {"dir": str(run), "resume": "auto"}})  # the kernel let go of a dead job's lock
    assert again == Outcome()
    assert LOCK_NAME not in names_in(run)


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    lock, flock = RunLock(tmp_path), fcntl.flock

    def flock_late(file: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        lock.release()  # between the other's open and its flock
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    with RunLock(tmp_path), pytest.raises(ConfigError, match="is in use by process"):
        RunLock(tmp_path)


def test_a_file_system_without_locks_is_said_aloud(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    assert attempt(make_tree(corpus, tmp_path / "run", train={"steps": 1})) == Outcome()
    assert "is on a file system without locks" in capsys.readouterr().err


@pytest.mark.parametrize("status", [None, "[]", '{"state": "todo"}', "not JSON"])
def test_auto_does_not_write_into_a_foreign_folder(corpus: Path, tmp_path: Path, status: str | None) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("mine")
    if status is not None:
        (run / "status.json").write_text(status)
    before = names_in(run)
    outcome = attempt(make_tree(corpus, run, run={"dir": str(run), "resume": "auto"}))
    assert outcome.status == 2
    assert f"run.dir = {run} holds config.yaml and neither a checkpoint nor the status.json of a run" in outcome.message
    assert names_in(run) == before
    assert (run / "config.yaml").read_text() == "mine"


def _fail_in(name: str, tree: Tree) -> Outcome:
    def broken(*arguments: Any) -> None:
        raise ConfigError("broken on purpose")

    original = getattr(command, name)
    setattr(command, name, broken)
    try:
        return attempt(tree)
    finally:
        setattr(command, name, original)


@pytest.mark.parametrize("name", ["_open", "_build_trainer", "_identity", "resume"])
def test_whatever_fails_after_the_claim_is_recorded(pool: Pool, corpus: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    tree = make_tree(corpus, run, parallel={"tensor": 2}, train={"steps": 1})
    if name == "resume":
        assert pool.run(2, attempt, tree=tree) == [Outcome()] * 2
        assert status_of(run)["state"] == "done"
        tree["run"]["resume"] = "auto"
    outcomes = pool.run(2, _fail_in, name=name, tree=tree)
    assert set(outcomes) == {Outcome(2, "broken on purpose")}
    status = status_of(run)
    assert (status["state"], status["exit_status"], status["error"]) == ("failed", 2, "broken on purpose")


def _no_space(*arguments: Any, **named: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_on_a_full_disk_the_status_is_overwritten_in_place(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*arguments: Any, **named: Any) -> None:
        monkeypatch.setattr(atomic.tempfile, "mkstemp", _no_space)
        _no_space()

    monkeypatch.setattr(recording.MetricsWriter, "write", fill)
    run = tmp_path / "run"
    outcome = attempt(make_tree(corpus, run))
    assert outcome.status == 4
    status = status_of(run)
    assert (status["state"], status["exit_status"], status["error"]) == ("failed", 4, outcome.message)


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl", "tensorboard"])
def test_what_is_in_the_way_of_a_log_is_one_line_on_all_ranks(
    pool: Pool, corpus: Path, tmp_path: Path, name: str
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "status.json").write_text(json.dumps({"state": "failed"}))
    if name == "tensorboard":
        (run / name).write_text("a file")
    else:
        (run / name).mkdir()
    tree = make_tree(corpus, run, parallel={"tensor": 2}, run={"dir": str(run), "resume": "auto"})
    outcomes = pool.run(2, attempt, tree=tree)
    assert len(set(outcomes)) == 1
    assert outcomes[0].status == 4
    assert f"cannot write {run / name}: " in outcomes[0].message
    assert "move away what is there" in outcomes[0].message
    assert status_of(run)["state"] == "failed"


def _close_on_a_full_disk(tree: Tree) -> Outcome:
    original = recording.MetricsWriter.close
    recording.MetricsWriter.close = _no_space if dist.get_rank() == 0 else original  # type: ignore[method-assign]
    try:
        return attempt(tree)
    finally:
        recording.MetricsWriter.close = original  # type: ignore[method-assign]


def test_a_log_that_cannot_be_closed_stops_all_ranks(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    tree = make_tree(corpus, tmp_path / "run", parallel={"tensor": 2}, train={"steps": 1})
    outcomes = pool.run(2, _close_on_a_full_disk, tree=tree)
    assert len(set(outcomes)) == 1
    assert outcomes[0].status == 4


def _one_rank_differs(tree: Tree, what: str, other: Path) -> Outcome:
    """Rank 1 finds other validation data, another tokenizer or another base under the same name."""
    original = {name: getattr(command, name) for name in ("open_examples", "load_tokenizer", "resolve_base")}
    if dist.get_rank() == 1 and what == "validation":
        command.open_examples = lambda path: original["open_examples"](other if "validation" in path else path)  # type: ignore[assignment]
    if dist.get_rank() == 1 and what != "validation":
        name = {"tokenizer": "load_tokenizer", "base": "resolve_base"}[what]
        setattr(command, name, lambda *arguments: _with_another_fingerprint(original[name](*arguments)))
    try:
        return attempt(tree)
    finally:
        for name, function in original.items():
            setattr(command, name, function)


def _with_another_fingerprint(value: Any) -> Any:
    object.__setattr__(value, "fingerprint", "another")
    return value


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("validation", "the validation data differs between ranks"),
        ("tokenizer", "the tokenizer differs between ranks"),
        ("base", "the base model differs between ranks"),
    ],
)
def test_ranks_with_different_inputs_never_start(
    pool: Pool, corpus: Path, tmp_path: Path, what: str, words: str
) -> None:
    tree = make_tree(corpus, tmp_path / "run")  # data-parallel: other batches would hang or mix
    other = make_corpus(tmp_path / "other", rows=30) / "validation.parquet"
    outcomes = pool.run(2, _one_rank_differs, tree=tree, what=what, other=other)
    assert len(set(outcomes)) == 1
    assert outcomes[0].status == 2
    assert words in outcomes[0].message


def test_run_folder_names_are_free_of_the_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path / "new"):
        assert names_in(tmp_path / "new") == [LOCK_NAME]
    assert names_in(tmp_path / "new") == []

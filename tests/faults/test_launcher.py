# SPDX-License-Identifier: Apache-2.0
"""No rank outlives its launcher, and a launcher that restarts its ranks gets its run back, and no other's."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lora_megatron.parallel.launcher import grace_of_torchrun, is_rank, launcher_identity
from tests.commands.runs import Tree, losses_of, make_tree, names_in, status_of
from tests.faults.ranks import PATIENCE_S, train_ranks
from tests.faults.restarts import recovered

# A launcher that starts one rank and waits; the rank says when it is bound to it.
LAUNCHER = """
import os, subprocess, sys
os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29999")
rank = "import os, time; import lora_megatron.__main__ as m; m._run = lambda _: (print(os.getpid(), flush=True), " \\
       "time.sleep(1000)); m.main(['inspect', '.'])"
subprocess.run([sys.executable, "-c", rank])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_no_rank_outlives_its_launcher(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        rank = int(launcher.stdout.readline())
        assert Path(f"/proc/{rank}").exists()
        launcher.send_signal(number)
        assert launcher.wait(PATIENCE_S) == -number
        deadline = time.monotonic() + PATIENCE_S
        while _runs(rank):
            assert time.monotonic() < deadline, "the rank is still there"
            time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:  # a zombie that nobody has waited for yet has ended
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_process_that_nobody_launched_is_bound_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert not is_rank()  # so a shell that ends leaves `nohup lora-megatron train` running
    host, parent, started = launcher_identity().split(":")
    assert (int(parent), host, started.isdecimal()) == (os.getppid(), os.uname().nodename, True)


def _restarted() -> None:
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"


def _launched_by_another() -> None:
    _restarted()
    from lora_megatron.commands import train

    train.launcher_identity = lambda: "elsewhere:1:2"  # type: ignore[assignment]


def _end(tree: Tree, folder: Path, **more: Any) -> tuple[list[int], str]:
    with train_ranks(tree, world=1, folder=folder, **more) as ranks:
        return ranks.statuses(), ranks.log()


def test_only_a_restart_by_the_same_launcher_goes_on_by_itself(corpus: Path, tmp_path: Path) -> None:
    run, through = tmp_path / "run", tmp_path / "through"
    train = {"steps": 8, "save_every": 2, "async_save": False}
    assert _end(make_tree(corpus, through, train=train), tmp_path / "a")[0] == [0]
    tree = make_tree(corpus, run, train=train)
    with train_ranks(tree, world=1, folder=tmp_path / "b", before=partial(_die_at, 6)) as ranks:
        assert ranks.statuses() == [-signal.SIGKILL]
    assert status_of(run)["state"] == "running"

    for before in (None, _launched_by_another):  # a new job, and the restart of another one
        before_it = (status_of(run), names_in(run / "checkpoints"))
        statuses, said = _end(tree, tmp_path / "c", **({"before": before} if before else {}))
        assert statuses == [2]
        assert f"error: run.dir = {run} holds a run already" in said
        assert (status_of(run), names_in(run / "checkpoints")) == before_it
    statuses, said = _end(tree, tmp_path / "d", before=_restarted)
    assert statuses == [0], said
    assert "resumed from" in said
    assert losses_of(run) == losses_of(through)
    assert len(losses_of(run)) == len((run / "metrics.jsonl").read_text().splitlines())


def _die_at(step: int) -> None:
    from lora_megatron.training import loop

    original = loop.train_step

    def train_step(trainer: Any) -> Any:
        if trainer.step + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(trainer)

    loop.train_step = train_step


def test_a_restart_before_the_first_checkpoint_begins_anew(corpus: Path, tmp_path: Path) -> None:
    tree = make_tree(corpus, tmp_path / "run", train={"steps": 4, "save_every": 2, "async_save": False})
    with train_ranks(tree, world=1, folder=tmp_path / "a", before=partial(_die_at, 2)) as ranks:
        assert ranks.statuses() == [-signal.SIGKILL]
    assert list(losses_of(tmp_path / "run")) == [1]
    assert _end(tree, tmp_path / "b", before=_restarted)[0] == [0]
    assert list(losses_of(tmp_path / "run")) == [1, 2, 3, 4]


@pytest.mark.slow  # tests/launch kills a worker under our own launcher, in every run
def test_torchrun_restarts_a_run_whose_rank_was_killed(tmp_path: Path) -> None:
    """`python -m tests.faults.restarts` does the same with eight deaths and every kind of rendezvous."""
    assert recovered(tmp_path, [3], kind="standalone", victim=1)


def test_the_grace_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert grace_of_torchrun("2.13.0") is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    assert grace_of_torchrun("2.13.0+cpu") == 30
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "90")
    assert grace_of_torchrun("2.13.0+cpu") == 90
    assert grace_of_torchrun("2.11.0+cu130") == 30  # knows no such variable


@pytest.mark.parametrize(
    ("command", "seconds"),
    [
        ("torchrun --shutdown-timeout 45 -m lora_megatron train a.yaml", 45),
        ("torchrun --shutdown_timeout=45 -m lora_megatron train a.yaml", 45),
        ("python -m lora_megatron.commands.launch train a.yaml", None),
        ("torchrun -m lora_megatron train a.yaml", 30),
    ],
)
def test_the_grace_is_read_off_the_launchers_command(
    monkeypatch: pytest.MonkeyPatch, command: str, seconds: float | None
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    monkeypatch.setattr(Path, "read_bytes", lambda self: "\0".join(command.split()).encode() + b"\0")
    assert grace_of_torchrun("2.13.0") == seconds


def _take_own_port() -> None:
    busy = socket.socket(socket.AF_INET6)  # as the store does, for both families
    busy.bind(("::", int(os.environ["MASTER_PORT"])))
    busy.listen()
    busy.detach()  # open until this process ends


@pytest.mark.parametrize(
    ("environment", "before", "speaks"),
    [
        ({"WORLD_SIZE": "2"}, None, "error: cannot join"),  # rank 1 never comes
        ({"WORLD_SIZE": "2", "RANK": "1"}, None, "rank 1: error: cannot join"),  # rank 0 never comes
        ({}, _take_own_port, "error: cannot join"),
    ],
    ids=["a missing node", "a missing first node", "a busy port"],
)
def test_a_world_that_does_not_come_together_is_one_line(
    corpus: Path, tmp_path: Path, environment: dict[str, str], before: Any, speaks: str
) -> None:
    tree = make_tree(corpus, tmp_path / "run", parallel={"timeout_minutes": 0.02})
    with train_ranks(tree, world=1, folder=tmp_path, environment=environment, before=before) as ranks:
        assert ranks.statuses() == [2]
        said = [line for line in ranks.log().splitlines() if "error:" in line]
    assert len(said) == 1
    assert said[0].startswith(f"{speaks} the processes of RANK=")
    assert said[0].endswith("start every one of them with torchrun, with the same address and a free port")
    assert not (tmp_path / "run").exists()

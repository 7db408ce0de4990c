# SPDX-License-Identifier: Apache-2.0
"""Ranks that can be killed: real processes that run `lora-megatron`, forked from one that has imported everything.

An attempt costs about a second instead of the six or seven that torchrun takes to import torch N times. Each rank gets
the environment that torchrun would give it and a log of its own; the test gets the pids.

    with start(["train", str(config)], world=2, logs=tmp_path / "logs") as ranks:
        ranks.wait_until(lambda: checkpoint_of(run, 2).exists())
        ranks.kill(1)
        assert ranks.statuses() == [6, -9]
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unittest.mock import patch

import torch
import torch.utils.tensorboard  # imported once, in the server, as train and its report would in every rank

from lora_megatron.__main__ import main
from lora_megatron.commands import train  # noqa: F401 - as above
from lora_megatron.measure import report

PATIENCE_S = 180.0  # for whatever a rank has to do: the machine may be busy with other work
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])


class Ranks:
    """The processes of one attempt, by rank. Left as a context, none of them is alive."""

    def __init__(self, processes: Sequence[ForkServerProcess], logs: Sequence[Path]) -> None:
        self._processes, self._logs = processes, logs

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids."""
        return [process.pid or 0 for process in self._processes]

    @property
    def alive(self) -> list[int]:
        """Ranks that run."""
        return [rank for rank, process in enumerate(self._processes) if process.is_alive()]

    def kill(self, *ranks: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to these ranks, to all without any; one that has ended gets none."""
        for rank in ranks or range(len(self._processes)):
            if self._processes[rank].is_alive():
                os.kill(self.pids[rank], number)

    def wait(self, *ranks: int, seconds: float | None = None) -> bool:
        """Whether these ranks, or all of them, have ended within the time."""
        deadline = time.monotonic() + (PATIENCE_S if seconds is None else seconds)
        waited = [self._processes[rank] for rank in ranks or range(len(self._processes))]
        for process in waited:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
        return not any(process.is_alive() for process in waited)

    def status(self, rank: int) -> int | None:
        """Exit status of a rank, None while it runs."""
        return self._processes[rank].exitcode

    def statuses(self, *, seconds: float = PATIENCE_S) -> list[int]:
        """Exit status of every rank, -9 after SIGKILL; AssertionError with the logs when one does not end."""
        assert self.wait(seconds=seconds), f"ranks {self.alive} still run after {seconds:.0f} s\n{self.logs()}"
        return [process.exitcode or 0 for process in self._processes]

    def wait_until(self, condition: Callable[[], bool], *, seconds: float = PATIENCE_S) -> None:
        """Wait for something the ranks do; AssertionError with the logs when they end or the time passes before."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = not self.alive
            assert not ended or condition(), f"the ranks ended before it happened\n{self.logs()}"
            assert time.monotonic() < deadline, f"it has not happened in {seconds:.0f} s\n{self.logs()}"
            time.sleep(0.005)

    def log(self, rank: int = 0) -> str:
        """What a rank has written to stdout and stderr."""
        return self._logs[rank].read_text(encoding="utf-8", errors="replace") if self._logs[rank].exists() else ""

    def logs(self) -> str:
        """The last lines of every rank, for messages."""
        return "\n".join(f"--- rank {rank}\n{self.log(rank)[-3000:]}" for rank in range(len(self._logs)))

    def close(self) -> None:
        """Kill whoever is left, stopped ones too."""
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()
            with contextlib.suppress(ValueError):
                process.close()


def start(
    arguments: Sequence[str],
    *,
    world: int,
    logs: Path,
    before: Callable[[], Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Ranks:
    """Start `lora-megatron ARGUMENTS` on `world` ranks, as torchrun would.

    `before` runs in every rank before the command and may patch what it calls (the rank is in os.environ["RANK"]); it
    must be picklable: a function of a module, or a partial of one. `environment` is added to that of torchrun.
    """
    logs.mkdir(parents=True, exist_ok=True)
    attempt = len(list(logs.glob("*-rank-0.log")))
    paths = [logs / f"{attempt}-rank-{rank}.log" for rank in range(world)]
    common = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    paths[0].touch()
    processes = []
    with patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}):  # what the server starts with
        for rank, path in enumerate(paths):
            own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), **(environment or {})}
            process = _CONTEXT.Process(target=_run, args=(list(arguments), own, path, before))
            process.start()
            processes.append(process)
    return Ranks(processes, paths)


def train_ranks(tree: Mapping[str, Any], *, world: int, folder: Path, **more: Any) -> Ranks:
    """Start `lora-megatron train` with the configuration `tree` (JSON is YAML); `folder` gets it and the logs."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / f"config-{len(list(folder.glob('config-*.yaml')))}.yaml"
    config.write_text(json.dumps(tree), encoding="utf-8")
    return start(["train", str(config)], world=world, logs=folder / "logs", **more)


def free_port() -> int:
    """A port that nobody listens on, outside of the range from which the system takes those of outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def _run(arguments: list[str], environment: dict[str, str], log: Path, before: Callable[[], Any] | None) -> None:
    """One rank: its environment, its log, and the command's exit status as that of the process."""
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    if before is not None:
        before()
    with patch.object(report, "draw_losses"):  # a picture costs more than the run
        status = main(arguments)
    sys.exit(status)

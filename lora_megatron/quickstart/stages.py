# SPDX-License-Identifier: Apache-2.0
"""Run a stage as a process of its own, show how far it is, and say in one line why it failed."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from lora_megatron import errors
from lora_megatron.errors import UserError
from lora_megatron.measure.console import TrainingProgress
from lora_megatron.measure.metrics import EVALUATIONS_NAME, METRICS_NAME
from lora_megatron.measure.units import show_loss
from lora_megatron.quickstart.configurations import RANKS

_POLL_SECONDS = 0.3
_GRACE_SECONDS = 15.0
_LOG_LINES_SHOWN = 15


def training_command(config: Path) -> list[str]:
    """A training on RANKS processes of this machine; the address keeps its own name out of the rendezvous."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    return [sys.executable, *launcher, "--nproc-per-node", str(RANKS), "-m", "lora_megatron", "train", str(config)]


def training_environment() -> dict[str, str]:
    """This process's environment, with what ranks that share one machine need."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        # glibc hands large blocks back to the kernel and gets them anew in every step, zeroed page by page. Keeping
        # them took seven profiled steps of the base from 1.13 s to 0.87 s, on a machine with other work.
        for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
            environment.setdefault(name, str(2**32))
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a laptop's own name may resolve to nothing
    if torch.cuda.device_count() < RANKS:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # NCCL wants a GPU per rank; with fewer, all ranks use the CPU
    return environment


class Follower:
    """Shows what another process appends to its metrics.jsonl and evaluations.jsonl; call it now and then."""

    def __init__(self, folder: Path, progress: TrainingProgress) -> None:
        self._folder, self._progress = folder, progress
        self._offsets = dict.fromkeys((METRICS_NAME, EVALUATIONS_NAME), 0)

    def _new_lines(self, name: str) -> Iterator[dict[str, Any]]:
        path = self._folder / name
        if not path.exists():
            return
        with open(path, "rb") as stream:
            stream.seek(self._offsets[name])
            whole, newline, _ = stream.read().rpartition(b"\n")  # the last line may be half written
        self._offsets[name] += len(whole) + len(newline)
        yield from map(json.loads, whole.splitlines())

    def __call__(self) -> None:
        for line in self._new_lines(EVALUATIONS_NAME):
            self._progress.note(f"held-out loss {show_loss(line['held_out_loss'])} after step {line['step']}")
        for line in self._new_lines(METRICS_NAME):
            rate = line.get("tokens_per_second_per_rank")
            self._progress.update(
                line["step"],
                loss=line.get("loss"),
                lr=line.get("lr"),
                tokens_per_second=None if rate is None else rate * RANKS,
            )


def run_stage(
    command: Sequence[str], *, log: Path, environment: Mapping[str, str], follow: Callable[[], None] = lambda: None
) -> None:
    """Run `command` to its end with all its output in `log`; never leaves it running.

    Raises:
        UserError: it failed for a reason it could name; of the class that has its exit status.
        RuntimeError: it failed otherwise; with the end of the log.
    """
    with open(log, "wb") as stream:
        stream.write(f"$ {shlex.join(command)}\n".encode())
        stream.flush()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=dict(environment)
        )
        try:
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
                follow()
            follow()
        finally:
            _stop(process)
    if process.returncode:
        raise _reason(log, process.returncode)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()  # torchrun ends its workers on TERM; on KILL it could not
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _reason(log: Path, status: int) -> Exception:
    """The `error: ...` line of the log as the error it was, or the log's end for a crash."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in reversed(lines):
        if line.startswith("error: "):
            return _error_class(log, status)(f"{line.removeprefix('error: ')} (log: {log})")
    end = "\n".join(lines[-_LOG_LINES_SHOWN:])
    return RuntimeError(f"a stage ended with status {status}; the end of {log}:\n{end}")


def _error_class(log: Path, status: int) -> type[UserError]:
    # torchrun ends with 1 whatever its workers ended with; a training leaves its own status in its run folder.
    recorded = log.parent.parent / log.stem / "status.json"
    if recorded.exists():
        status = json.loads(recorded.read_text(encoding="utf-8")).get("exit_status", status)
    classes = {number: name for name, number in errors.EXIT_STATUS_BY_NAME.items()}
    found: type[UserError] = getattr(errors, classes.get(status, "UserError"))
    return found


@contextmanager
def termination_as_exit() -> Iterator[None]:
    """Within, SIGTERM raises SystemExit, so that what is running is ended in order."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)

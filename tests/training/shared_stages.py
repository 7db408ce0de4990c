# SPDX-License-Identifier: Apache-2.0
"""What `parallel.stage_copies` does on GPUs of one host, done by processes of a CPU: threads for streams, files for the
memory they share, a thread that looks again and again for a stream that waits for a number.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import torch

from lora_megatron.parallel import cpu_backend, shared_box, stage_copies
from tests.layers.shared_boxes import SharedBox

LONGEST_WAIT_S, LONGEST_OF_A_FAULT_S = 60.0, 2.0
NOBODY_WAITS = {"full": "for a message", "busy": "for room", "handle": "for what was received"}
"""Faults that tests must notice: what is not waited for."""


class Started:
    """As a CUDA event."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result(LONGEST_WAIT_S)

    def query(self) -> bool:
        return self._future.done()


class ThreadLane:
    """Stands in for a stream beside the main one: what is done so far on a CPU is done."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self.last: Future[None] | None = None

    def run(self, work: Callable[[], None]) -> Started:
        self.last = self._thread.submit(work)
        return Started(self.last)

    run_at_once = run

    def is_idle(self) -> bool:
        return self.last is None or self.last.done()


class NumberedBox(SharedBox):
    """A box whose numbers are looked at until they are what is waited for."""

    forgotten = -1
    """The value that nobody waits for."""
    longest_s = LONGEST_WAIT_S

    def write(self, rank: int, place: int, value: int) -> None:
        self._be_slow()
        self._number(rank, place).fill_(value)

    def wait(self, place: int, value: int) -> None:
        number, until = self._number(self.group.rank(), place), time.monotonic() + self.longest_s
        while int(number) != value and value != self.forgotten:
            if time.monotonic() > until:
                raise TimeoutError(f"rank {self.group.rank()}: the number at {place} never was {value}")
            time.sleep(1e-4)

    def _number(self, rank: int, place: int) -> torch.Tensor:
        return self.parts[rank][place : place + 4].view(torch.int32)


@contextlib.contextmanager
def copying(*, delay: float = 0.0, forgotten: str = "") -> Iterator[None]:
    """Within, pipeline stages of a CPU that are to copy do it through files; on GPUs nothing is changed.

    delay: of rank 1 and above, at each thing it does, seconds; forgotten: one of `NOBODY_WAITS`.
    """
    if torch.cuda.is_available():
        yield
        return
    cpu_backend.install()
    patches: list[tuple[Any, str, Any]] = [
        (stage_copies, "Box", NumberedBox),
        (stage_copies, "Lane", ThreadLane),
        (shared_box, "_made", {}),
        (NumberedBox, "delay", delay),
        (NumberedBox, "longest_s", LONGEST_OF_A_FAULT_S if forgotten else LONGEST_WAIT_S),
        (NumberedBox, "forgotten", {"full": 1, "busy": 0}.get(forgotten, -1)),
    ]
    if forgotten == "handle":
        patches.append((Started, "wait", lambda self: None))
    with contextlib.ExitStack() as stack:
        for what, name, value in patches:
            stack.enter_context(patch.object(what, name, value))
        yield

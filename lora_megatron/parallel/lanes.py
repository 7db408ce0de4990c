# SPDX-License-Identifier: Apache-2.0
"""Streams beside the main one, which may wait for another rank; and how they come to an end when that gives no answer.

CUDA ends a context only after its streams. One that waits for a number which nobody will write (`stream_values`) keeps
its process from ending, and from giving back memory before that. What it waits for is in this rank's own memory as a
rule, so that this rank can write it itself, from a stream that waits for nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Protocol

import torch

PATIENCE_S = 1.0
"""For which others may still do what streams wait for."""
LONGEST_S = 10.0
"""For which streams may take to come to their end: what they do may wait for a collective, too, as in any lost job."""
_PERIOD_S = 1e-3


class Handle(Protocol):
    """Of something that was started."""

    def wait(self) -> object:
        """Nothing that the current stream is given after this begins before it is done."""
        ...

    def query(self) -> bool:
        """Whether it is done already."""
        ...


class Lane:
    """What is done in order beside the main stream."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream(priority=-1)

    def run(self, work: Callable[[], None]) -> Handle:
        """Do it once all that the current stream has been given so far is done."""
        self.stream.wait_stream(torch.cuda.current_stream())
        return self.run_at_once(work)

    def run_at_once(self, work: Callable[[], None]) -> Handle:
        """Do it, whatever the current stream waits for."""
        with torch.cuda.stream(self.stream):
            work()
            event: torch.cuda.Event = self.stream.record_event()
        return event

    def is_idle(self) -> bool:
        """Whether all that it was given is done."""
        return self.stream.query()


def run_out(lanes: Collection[Lane], *, aside: Lane, free: Callable[[], None]) -> None:
    """Return once the lanes are idle, or after `LONGEST_S`. Where patience does not help, `free` is done on `aside`,
    time and again, as what it writes is good for one wait."""
    began = time.monotonic()
    while not all(lane.is_idle() for lane in lanes) and (taken := time.monotonic() - began) < LONGEST_S:
        if taken >= PATIENCE_S and aside.is_idle():  # a stream that is full would hold up this thread
            aside.run_at_once(free)
        time.sleep(_PERIOD_S)

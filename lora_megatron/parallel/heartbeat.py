# SPDX-License-Identifier: Apache-2.0
"""How far this process has come: what the watchdog of every rank looks at, and where data takes its time.

`beat` is called wherever work goes on: a microbatch, an evaluation batch, a tensor read or written. It costs less than
a microsecond and says nothing to anybody.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Beat:
    """The last sign of progress: which in a row it is, when it came (monotonic seconds), and in what."""

    count: int
    seconds: float
    phase: str
    step: int


_last = Beat(0, time.monotonic(), "start", 0)
_data_seconds = 0.0


def beat(phase: str = "", *, step: int | None = None) -> None:
    """Say that there is progress: in the same phase and step unless another is named."""
    global _last
    _last = Beat(
        _last.count + 1, time.monotonic(), phase or _last.phase, _last.step if step is None else step
    )  # one assignment: another thread reads it


def last_beat() -> Beat:
    """The newest."""
    return _last


@contextlib.contextmanager
def making_data(then: str) -> Iterator[None]:
    """Within, this process makes a microbatch; afterwards it is in the phase `then`."""
    global _data_seconds
    beat("data")
    started = time.perf_counter()
    yield
    _data_seconds += time.perf_counter() - started
    beat(then)


def data_seconds() -> float:
    """What making microbatches has taken since this process began."""
    return _data_seconds

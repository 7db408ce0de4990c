# SPDX-License-Identifier: Apache-2.0
"""How far this process has come: what the watchdog of every rank looks at, and where data takes its time.

`beat` is called wherever work goes on: a microbatch, an evaluation batch, a tensor read or written. It costs about
a microsecond and says nothing to anybody.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Beat:
    """The last sign of progress: which it is in its step, when it came (monotonic seconds), and in what."""

    count_in_step: int
    seconds: float
    phase: str
    step: int


_last = Beat(0, time.monotonic(), "start", 0)
_background_seconds = _data_seconds = 0.0


def beat(phase: str = "", *, step: int | None = None) -> None:
    """Say that there is progress: in the same phase and step unless another is named.

    From any thread but the main one, such as a writer in the background, it only says that the process gets on.
    """
    global _last, _background_seconds
    if threading.current_thread() is not threading.main_thread():
        _background_seconds = time.monotonic()
        return
    old = _last
    count = old.count_in_step + 1 if step is None else 0
    # One assignment: another thread reads it.
    _last = Beat(count, time.monotonic(), phase or old.phase, old.step if step is None else step)


def last_beat() -> Beat:
    """The newest."""
    return _last if _last.seconds >= _background_seconds else replace(_last, seconds=_background_seconds)


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

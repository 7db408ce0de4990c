# SPDX-License-Identifier: Apache-2.0
"""How many rows are done, how fast, and the time that remains: a bar on stderr, or a line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_megatron.measure.console import SECONDS_BETWEEN_LINES
from lora_megatron.measure.units import show_seconds


class RowsProgress:
    """total: rows in all; first: where a resumed evaluation continues; enabled: off on all ranks but one.
    bar: a line every few seconds also at a terminal, where a bar of somebody else's is.

    stream and clock (seconds) are for tests.
    """

    def __init__(
        self,
        total: int,
        *,
        first: int = 0,
        description: str,
        enabled: bool = True,
        bar: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._first, self._done, self._description = total, first, first, description
        self._stream, self._clock = stream if stream is not None else sys.stderr, clock
        self._enabled = enabled
        self._bar: Progress | None = None
        self._started = clock()
        self._next_line = self._started + SECONDS_BETWEEN_LINES
        console = Console(file=self._stream)
        if enabled and bar and console.is_terminal:
            columns = (MofNCompleteColumn(), TextColumn("{task.fields[rate]}", markup=False), TimeRemainingColumn())
            self._bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=24), *columns, console=console)
            self._task = self._bar.add_task(description, total=total, completed=first, rate="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, rows: int) -> None:
        """Say that so many rows more are done; of those that a resumed evaluation computes again, none counts twice."""
        self._done = min(self._done + rows, self._total)
        now = self._clock()
        rate = (self._done - self._first) / max(now - self._started, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=f"{rate:.1f} rows/s")
        elif self._enabled and now >= self._next_line:
            self._next_line = now + SECONDS_BETWEEN_LINES
            missing = self._total - self._done
            left = f"  {show_seconds(missing / max(rate, 1e-9))} left" if missing else ""
            print(
                f"{self._description}  {self._done} of {self._total} rows  {rate:.1f} rows/s{left}",
                file=self._stream,
                flush=True,
            )

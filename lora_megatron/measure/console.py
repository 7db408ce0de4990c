# SPDX-License-Identifier: Apache-2.0
"""What a person at a terminal sees: a progress bar on stderr, tables on stdout; on one rank only.

Without a terminal (a log file, a scheduler) the bar becomes a plain line every few seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from lora_megatron.measure.units import MISSING, show_bytes, show_count, show_loss, show_seconds

SECONDS_BETWEEN_LINES = 5.0
_WIDTH_WITHOUT_TERMINAL = 120


class TrainingProgress:
    """Step, loss, learning rate, tokens/s and the time that remains.

    total_steps: the last step; first_step: where a resumed run continues. enabled: off on all ranks but one.
    stream and clock (seconds) are for tests.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        enabled: bool = True,
        description: str = "train",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._step = first_step
        self._description = description
        self._clock = clock
        self._first_seen: tuple[int, float] | None = None  # step and time, after start-up: what an estimate starts from
        self._next_line = clock()  # the first step speaks at once: it proves that the run is alive
        self._stream = stream if stream is not None else sys.stderr
        self._enabled = enabled
        self._bar: Progress | None = None
        if enabled:
            console = Console(file=self._stream)
            if console.is_terminal:
                self._bar = _progress_bar(console)
                self._task = self._bar.add_task(description, total=total_steps, completed=first_step, numbers="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(
        self, step: int, *, loss: float | None = None, lr: float | None = None, tokens_per_second: float | None = None
    ) -> None:
        """Show that `step` steps are done (loss in nats per token)."""
        if not self._enabled:
            return
        self._step = step
        numbers = f"loss {show_loss(loss)}  lr {MISSING if lr is None else f'{lr:.2e}'}  "
        numbers += f"{show_count(tokens_per_second)} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
            return
        now = self._clock()
        self._first_seen = self._first_seen or (step, now)
        if now < self._next_line and step != self._total:
            return
        self._next_line = now + SECONDS_BETWEEN_LINES
        self._print(f"{self._description}  step {step}/{self._total}  {numbers}{self._remaining(now)}")

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(Text(text))
        elif self._enabled:
            self._print(text)

    def _remaining(self, now: float) -> str:
        assert self._first_seen is not None
        first_step, first_time = self._first_seen
        done, left = self._step - first_step, self._total - self._step
        return f"  {show_seconds((now - first_time) / done * left)} left" if done > 0 and left > 0 else ""

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class BytesProgress:
    """How much of a number of bytes is done, how fast, and the time that remains; a line every few seconds without a
    terminal, and none at all for what takes less.
    """

    def __init__(self, total: int, *, description: str, enabled: bool = True, stream: TextIO | None = None) -> None:
        self._total, self._done, self._description = total, 0, description
        self._stream = stream if stream is not None else sys.stderr
        self._enabled, self._bar = enabled, None
        self._started = time.monotonic()
        self._next_line = self._started + SECONDS_BETWEEN_LINES
        console = Console(file=self._stream)
        if enabled and console.is_terminal:
            columns = (DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=24), *columns, console=console)
            self._task = self._bar.add_task(description, total=total)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """Say that `count` bytes more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif self._enabled and (now := time.monotonic()) >= self._next_line:
            self._next_line = now + SECONDS_BETWEEN_LINES
            seconds = (now - self._started) / max(self._done, 1) * (self._total - self._done)
            left = f"  {show_seconds(seconds)} left" if seconds > 0 else ""
            done = f"{show_bytes(self._done)} of {show_bytes(self._total)}"
            print(f"{self._description}  {done}{left}", file=self._stream, flush=True)


def _progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}", markup=False),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=4,
    )


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: bool = True,
    stream: TextIO | None = None,
) -> None:
    """A table; the first column is text, the others are numbers, aligned on the right, or text as well."""
    table = Table(title=Text(title, style="bold"), title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if index and numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    stream = stream if stream is not None else sys.stdout
    Console(file=stream, width=None if stream.isatty() else _WIDTH_WITHOUT_TERMINAL).print(table)

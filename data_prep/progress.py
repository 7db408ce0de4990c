# SPDX-License-Identifier: Apache-2.0
"""A progress bar on stderr when that is a terminal, nothing otherwise; and the closing summary on stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from data_prep.writer import DatasetWriter

Item = TypeVar("Item")


def with_progress(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """Pass `items` on, showing how many of `total` went by."""
    if not sys.stderr.isatty():
        yield from items
        return
    yield from track(items, description=description, total=total, console=Console(stderr=True))


def print_summary(writer: DatasetWriter, out: Path) -> None:
    """Rows per split and where they are, one line each."""
    for split, rows in writer.rows.items():
        print(f"{split:<12}{rows:>9,} rows  {out / f'{split}.parquet'}")
    if writer.rejected:
        print(f"{'rejected':<12}{writer.rejected:>9,} records (named on stderr)")

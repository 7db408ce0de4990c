# SPDX-License-Identifier: Apache-2.0
"""The closing summary on stdout: what was written, how long it is, and what was left aside."""

from __future__ import annotations

from pathlib import Path

from data_prep.lengths import Lengths
from data_prep.writer import DatasetWriter


def print_summary(writer: DatasetWriter, out: Path, lengths: Lengths | None = None) -> None:
    """Rows per split, their tokens or bytes, and where they are, one line each."""
    for split, rows in writer.rows.items():
        size = f"  {lengths.describe(split)}" if lengths else ""
        print(f"{split:<12}{rows:>9,} rows{size}  {out / f'{split}.parquet'}")
    for reason, count in writer.left_out.items():
        print(f"{'left out':<12}{count:>9,} records: {reason}")
    if writer.rejected:
        print(f"{'rejected':<12}{writer.rejected:>9,} records (named on stderr)")

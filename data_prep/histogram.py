# SPDX-License-Identifier: Apache-2.0
"""A histogram of counts as lines of text: bars of block characters, the number beside each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_MOST_BINS = 12
_BAR = 40


def bin_width(longest: int, *, most_bins: int = _MOST_BINS) -> int:
    """The least of 1, 2, 5, 10, 20, 50 .. with which `longest` is in one of the first `most_bins` bins."""
    scale = 1
    while True:
        for step in (1, 2, 5):
            if longest // (step * scale) < most_bins:
                return step * scale
        scale *= 10


def bar(value: int, largest: int, *, width: int = _BAR) -> str:
    """A bar of `width` characters for `largest`, exact to an eighth; anything above nothing shows."""
    eighths = max(round(value / largest * width * 8), 1) if value else 0
    return _EIGHTHS[8] * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")


def histogram(lengths: Sequence[int]) -> list[str]:
    """`20-29  ███▌  35` for each bin from that of the shortest to that of the longest of `lengths` (at least one)."""
    values = np.asarray(lengths, dtype=np.int64)
    width = bin_width(int(values.max()))
    counts = np.bincount(values // width)
    first = int(values.min()) // width
    digits = len(f"{(len(counts)) * width - 1:,}")
    lines = []
    for index in range(first, len(counts)):
        low, high, count = index * width, (index + 1) * width - 1, int(counts[index])
        label = f"{low:>{digits},}" if width == 1 else f"{low:>{digits},}-{high:<{digits},}"
        lines.append(f"{label}  {bar(count, int(counts.max())):<{_BAR}} {count:>9,}")
    return lines


def summary_of(lengths: Sequence[int]) -> str:
    """`least 3, median 40, mean 41.2, 95% up to 77, most 120`."""
    values = np.asarray(lengths)
    # The smallest length that as many rows do not exceed: one that occurs, not one between two.
    median, most_rows = (int(np.quantile(values, share, method="inverted_cdf")) for share in (0.5, 0.95))
    return (
        f"least {values.min():,}, median {median:,}, mean {values.mean():,.1f}, "
        f"95% up to {most_rows:,}, most {values.max():,}"
    )

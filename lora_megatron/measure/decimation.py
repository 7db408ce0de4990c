# SPDX-License-Identifier: Apache-2.0
"""Fewer points of a long curve, without losing what a reader looks for: its extremes, its ends and its gaps."""

from __future__ import annotations

from collections.abc import Sequence

XY = tuple[float, float | None]
"""A point of a curve; y is None where nothing finite was recorded."""
MOST_POINTS = 1000
_LARGEST = 1e300  # beyond it the differences that an axis is made of overflow


def finite(value: float | None) -> float | None:
    """`value` if it can be drawn, else None: NaN, infinities and what is no number at all."""
    if isinstance(value, bool) or not isinstance(value, float | int):
        return None
    return float(value) if -_LARGEST < value < _LARGEST else None


def decimate(points: Sequence[XY], *, most: int = MOST_POINTS) -> list[XY]:
    """At most `most` (8 or more) of `points`, in their order.

    The curve is cut into pieces of equally many points; each keeps its lowest and its highest point and the first of
    its gaps. The first and the last point stay as well, so the smallest, the largest and both ends of y survive.
    """
    assert most >= 8
    if len(points) <= most:
        return list(points)
    pieces = (most - 2) // (3 if any(y is None for _, y in points) else 2)
    kept = {0, len(points) - 1}
    for piece in range(pieces):
        first, end = len(points) * piece // pieces, len(points) * (piece + 1) // pieces
        values = [(y, index) for index in range(first, end) if (y := points[index][1]) is not None]
        if values:
            kept |= {min(values)[1], max(values)[1]}
        if len(values) < end - first:
            kept.add(next(index for index in range(first, end) if points[index][1] is None))
    return [points[index] for index in sorted(kept)]

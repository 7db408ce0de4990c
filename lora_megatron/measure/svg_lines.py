# SPDX-License-Identifier: Apache-2.0
"""Curves over steps as inline SVG: lines that break where a value is missing, a mark over each such gap, the values at
the pointer. Thousands of steps stay small: curves are decimated, and the page answers to the pointer in slices."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lora_megatron.measure.decimation import XY, decimate
from lora_megatron.measure.html_page import Html, escape
from lora_megatron.measure.svg_axes import (
    WIDTH,
    Scale,
    figure,
    fitting,
    key,
    label,
    line,
    log_ticks,
    tick_text,
    ticks,
    value_text,
)

HEIGHT, TALL = 292, 640
_LEFT, _RIGHT, _TOP = 62, WIDTH - 14, 36
_FOOT = 48  # below the axis: its numbers and its name
_SLICES = 90  # of the plot's width: each tells its values to the pointer
_GAP_PIXELS = 3.0  # gaps nearer to one another are marked as one
_LOG_RATIO = 50.0
_KINDS = {"line": "", "thin": " thin", "dash": " dash"}  # classes of the page's style


@dataclass(frozen=True)
class Series:
    """points: (x, y) with x rising, y in the chart's unit or None where there is no finite value.

    style: `line`, `dash`, `thin` (a noisy curve behind a smooth one) or `marks` (nothing was measured in between).
    colour: 0 to 5 of the style's palette.
    """

    name: str
    points: Sequence[XY]
    style: Literal["line", "dash", "thin", "marks"] = "line"
    colour: int = 0


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    y_label: str,
    unit: str = "",
    x_label: str = "step",
    from_zero: bool = False,
    may_be_log: bool = False,
    tall: bool = False,
) -> Html:
    """Curves over `x_label`. unit: of y, such as `s`, `bytes` (shown in the size that fits) or any other word.

    from_zero: the axis of y starts at 0. may_be_log: it is logarithmic if all values are positive and span much.
    tall: as high as two charts one above the other.
    """
    shown = [one for one in series if one.points]
    values = [y for one in shown for _, y in one.points if y is not None]
    height = TALL if tall else HEIGHT
    foot = height - _FOOT
    if not values:
        missing = "no finite value was recorded" if shown else "nothing was recorded"
        frame = line(_LEFT, foot, _RIGHT, foot, "zero")
        text = label((_LEFT + _RIGHT) / 2, (_TOP + foot) / 2, missing)
        return figure(title, [], [frame, text], height=height, description=missing)
    divisor, unit_name = fitting(unit, max(values, key=abs))
    log = may_be_log and min(values) > 0 and max(values) > _LOG_RATIO * min(values)
    across = _x_scale([x for one in shown for x in (one.points[0][0], one.points[-1][0])])
    up = _y_scale([value / divisor for value in (min(values), max(values))], foot, from_zero=from_zero, log=log)
    y_name = f"{y_label}{f' ({unit_name})' if unit_name else ''}{', log scale' if log else ''}"
    body = [*_frame(across, up, y_name, x_label, tall=tall), *_gaps(shown, across, foot, x_label)]
    for one in shown:
        body += _draw(one, across, up, divisor)
    body += _slices(shown, across, foot, unit, x_label)
    ends = "; ".join(_ends(one, unit, x_label) for one in shown)
    keys = [key(one.name, _symbol(one)) for one in shown] if len(shown) > 1 else []
    return figure(title, keys, body, height=height, description=f"{y_label} over {x_label}. {ends}")


def _ends(one: Series, unit: str, x_label: str) -> str:
    known = [(x, y) for x, y in one.points if y is not None]
    if not known:
        return f"{one.name}: no finite value"
    (x, y), (last_x, last_y) = known[0], known[-1]
    return f"{one.name}: {value_text(y, unit)} at {x_label} {x:g}, {value_text(last_y, unit)} at {x_label} {last_x:g}"


def _x_scale(ends: Sequence[float]) -> Scale:
    low, high = min(ends), max(ends)
    if low == high:
        low, high = low - 1, high + 1
    return Scale(low, high, _LEFT + 6, _RIGHT - 6)


def _y_scale(ends: Sequence[float], foot: float, *, from_zero: bool, log: bool) -> Scale:
    low, high = ends
    if log:
        return Scale(low / 1.15, high * 1.15, foot, _TOP, log=True)
    low, high = (min(low, 0.0), max(high, 0.0)) if from_zero else (low, high)
    span = high - low if high - low > 1e-9 * max(abs(low), abs(high)) else max(abs(high), 1e-12) * 0.2
    below = 0.0 if from_zero and low == 0 else 0.06 * span
    return Scale(low - below, high + 0.06 * span, foot, _TOP)


def _frame(across: Scale, up: Scale, y_label: str, x_label: str, *, tall: bool) -> list[str]:
    foot = up.first
    body = [label(0, 14, y_label, anchor="start", kind="strong")]
    for value in log_ticks(up.low, up.high) if up.log else ticks(up.low, up.high, count=10 if tall else 5):
        body.append(line(_LEFT, up.at(value), _RIGHT, up.at(value), "rule"))
        body.append(label(_LEFT - 8, up.at(value) + 4.5, tick_text(value), anchor="end"))
    body.append(line(_LEFT, foot, _RIGHT, foot, "zero"))
    for value in ticks(across.low, across.high, whole=True):
        body.append(line(across.at(value), foot, across.at(value), foot + 5, "zero"))
        body.append(label(across.at(value), foot + 21, tick_text(value)))
    return [*body, label((_LEFT + _RIGHT) / 2, foot + 42, x_label, kind="strong")]


def _draw(one: Series, across: Scale, up: Scale, divisor: float) -> list[str]:
    places = [None if y is None else (across.at(x), up.at(y / divisor)) for x, y in decimate(one.points)]
    if one.style == "marks":
        return [_mark(*place, one.colour) for place in places if place is not None]
    steps: list[str] = []
    open_line = False
    for index, place in enumerate(places):
        if place is not None:
            alone = not open_line and (index + 1 == len(places) or places[index + 1] is None)
            steps.append(f"{'L' if open_line else 'M'}{place[0]:g} {place[1]:g}{'h0' if alone else ''}")
        open_line = place is not None
    return [f'<path class="curve{_KINDS[one.style]} l{one.colour}" d="{"".join(steps)}"/>'] if steps else []


def _mark(x: float, y: float, colour: int, *, size: float = 6) -> str:
    """No meaning may rest on colour alone: shapes differ too."""
    if colour % 2 == 0:
        return f'<circle class="mark f{colour}" cx="{x:g}" cy="{y:g}" r="{size - 1:g}"/>'
    r = f"{size:g}"
    return f'<path class="mark f{colour}" d="M{x:g} {y - size:g}l{r} {r}l-{r} {r}l-{r} -{r}z"/>'


def _symbol(one: Series) -> str:
    if one.style == "marks":
        return _mark(11, 5, one.colour, size=5)
    return f'<path class="curve{_KINDS[one.style]} l{one.colour}" d="M1 5h20"/>'


def _gaps(series: Sequence[Series], across: Scale, foot: float, x_label: str) -> list[str]:
    """A band and a cross over the places where some series has no finite value."""
    runs = sorted(
        (points[0][0], points[-1][0])
        for one in series
        for missing, group in itertools.groupby(one.points, key=lambda point: point[1] is None)
        if missing and (points := list(group))
    )
    bands: list[tuple[float, float, bool]] = []  # first, last, whether there are values in between
    for first, last in runs:
        if bands and across.at(first) - across.at(bands[-1][1]) < _GAP_PIXELS:
            start, end, mixed = bands[-1]
            bands[-1] = (start, max(end, last), mixed or first > end + 1)
        else:
            bands.append((first, last, False))
    body = []
    for first, last, mixed in bands:
        left, right = across.at(first) - 1.5, across.at(last) + 1.5
        where = f"{x_label} {first:g}" if first == last else f"{x_label}s {first:g} to {last:g}"
        cross = label((left + right) / 2, _TOP - 3, "×", kind="gone")
        body.append(
            f'<g><title>no finite value: {"some of " if mixed else ""}{escape(where)}</title><rect class="gap" '
            f'x="{left:g}" y="{_TOP}" width="{right - left:g}" height="{foot - _TOP}"/>{cross}</g>'
        )
    return body


def _slices(series: Sequence[Series], across: Scale, foot: float, unit: str, x_label: str) -> list[str]:
    """Invisible columns over the plot; each tells the values under it when the pointer rests there."""
    columns = [[x for x, _ in one.points] for one in series]
    xs = sorted({x for column in columns for x in column})
    count = min(_SLICES, len(xs))
    starts = [xs[len(xs) * index // count] for index in range(count)]
    body = []
    for index, start in enumerate(starts):
        last = xs[len(xs) * (index + 1) // count - 1]
        found = [
            (one.name, one.points[bisect.bisect_left(column, start) : bisect.bisect_right(column, last)])
            for one, column in zip(series, columns, strict=True)
        ]
        lines = [f"{x_label} {start:g}" if start == last else f"{x_label}s {start:g} to {last:g}"]
        lines += [f"{name}: {_range_text(points, unit)}" for name, points in found if points]
        left = _LEFT if index == 0 else (across.at(start) + across.at(xs[len(xs) * index // count - 1])) / 2
        end = _RIGHT if index + 1 == count else (across.at(last) + across.at(starts[index + 1])) / 2
        text = escape("\n".join(lines))
        body.append(
            f'<rect class="spot" x="{left:.1f}" y="{_TOP}" width="{max(end - left, 1):.1f}" '
            f'height="{foot - _TOP}"><title>{text}</title></rect>'
        )
    return body


def _range_text(points: Sequence[XY], unit: str) -> str:
    known = [y for _, y in points if y is not None]
    if not known:
        return "no finite value"
    low, high = value_text(min(known), unit), value_text(max(known), unit)
    return low if low == high else f"{low} to {high}"

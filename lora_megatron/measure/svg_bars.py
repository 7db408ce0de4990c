# SPDX-License-Identifier: Apache-2.0
"""Bars as inline SVG: parts of a whole one above the other, and how often a value fell where."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_megatron.measure.html_page import Html, escape
from lora_megatron.measure.svg_axes import (
    WIDTH,
    Scale,
    figure,
    fitting,
    key,
    label,
    line,
    round_step,
    tick_text,
    ticks,
    value_text,
)

_RIGHT = WIDTH - 14
_ROW, _THICK = 34, 20
_LONGEST_NAME = 30
_CLASSES = 24  # of a histogram, about
_TAIL = 1.5  # values above this many times the 99th percentile share one class, or they would flatten the others


@dataclass(frozen=True)
class Bar:
    """A row: its name, the size of each part, and where a line marks a limit, if one does."""

    name: str
    parts: Mapping[str, float]
    limit: float | None = None
    remark: str = ""


def stacked_bars(title: str, bars: Sequence[Bar], *, x_label: str, unit: str = "", limit_name: str = "") -> Html:
    """Horizontal bars, each the sum of its parts (all >= 0, of one `unit`), with the sum written at its end.

    The parts' order is that in which they first occur. limit_name: what the bars' limits are.
    """
    names = list(dict.fromkeys(name for bar in bars for name in bar.parts))
    sums = [sum(bar.parts.values()) for bar in bars]
    largest = max([*sums, *(bar.limit or 0 for bar in bars)], default=0.0)
    if largest <= 0:
        text = label(WIDTH / 2, 40, "nothing was recorded")
        return figure(title, [], [text], height=80, description="nothing was recorded")
    divisor, unit_name = fitting(unit, largest)
    left = 16 + 7.6 * max(len(_short(bar.name)) for bar in bars)
    across = Scale(0, largest / divisor, left, _RIGHT - 82)
    foot = 8 + _ROW * len(bars)
    body = []
    for value in ticks(0, across.high):
        body += [
            line(across.at(value), 4, across.at(value), foot, "rule"),
            label(across.at(value), foot + 18, tick_text(value)),
        ]
    for row, (bar, total) in enumerate(zip(bars, sums, strict=True)):
        body += _bar(
            bar, total, across, divisor, unit, y=8 + _ROW * row, colours={n: i % 6 for i, n in enumerate(names)}
        )
    body += [line(left, 4, left, foot, "zero")]
    body += [
        label((left + _RIGHT - 82) / 2, foot + 40, f"{x_label}{f' ({unit_name})' if unit_name else ''}", kind="strong")
    ]
    keys = [key(name, f'<rect class="f{i % 6}" width="22" height="10" rx="2"/>') for i, name in enumerate(names)]
    if limit_name and any(bar.limit is not None for bar in bars):
        keys.append(key(limit_name, '<line class="limit" x1="11" y1="0" x2="11" y2="10"/>'))
    described = "; ".join(f"{bar.name}: {value_text(total, unit)}" for bar, total in zip(bars, sums, strict=True))
    return figure(title, keys if len(names) > 1 else keys[1:], body, height=foot + 48, description=described)


def _bar(
    bar: Bar, total: float, across: Scale, divisor: float, unit: str, *, y: float, colours: Mapping[str, int]
) -> list[str]:
    body = [label(across.first - 8, y + 14.5, _short(bar.name), anchor="end", kind="strong")]
    start = 0.0
    for name, value in bar.parts.items():
        left, right = across.at(start / divisor), across.at((start + value) / divisor)
        start += value
        if value > 0:
            body.append(
                f'<rect class="bar f{colours[name]}" x="{left:g}" y="{y:g}" width="{max(right - left, 0.5):g}" '
                f'height="{_THICK}"><title>{escape(f"{bar.name}, {name}: {value_text(value, unit)}")}</title></rect>'
            )
    end = across.at(total / divisor)
    if bar.limit is not None:
        place = across.at(bar.limit / divisor)
        end = max(end, place)
        body.append(line(place, y - 4, place, y + _THICK + 4, "limit"))
    return [*body, label(end + 8, y + 14.5, bar.remark or value_text(total, unit), anchor="start", kind="strong")]


def _short(name: str) -> str:
    """A name that leaves room for its bar; the bar itself tells the whole one."""
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


@dataclass(frozen=True)
class Class:
    """`count` values from `low` to below `high`; the last class has its end too, and an infinite `high` all above."""

    low: float
    high: float
    count: int


def classes_of(values: Sequence[float]) -> list[Class]:
    """Classes of equal, round width from the smallest of `values` (finite, not none) to the largest.

    What lies far above the others falls into one open class at the end; every value falls into exactly one.
    """
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    common = _TAIL * ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)]
    top = ordered[bisect.bisect_right(ordered, common) - 1] if 0 < common < high else high
    span = top - low if top - low > 1e-9 * abs(top) else max(abs(top), 1e-12) * 0.1
    width = round_step(span, _CLASSES)
    first = math.floor(low / width + 1e-9)
    count = max(1, math.ceil((top - first * width) / width - 1e-9))
    edges = [(first + number) * width for number in range(count + 1)]
    inner = [bisect.bisect_left(ordered, edge) for edge in edges[1:-1]]
    cuts = [0, *inner, bisect.bisect_right(ordered, max(edges[-1], top))]
    classes = [Class(edges[i], edges[i + 1], cuts[i + 1] - cuts[i]) for i in range(count)]
    beyond = len(ordered) - cuts[-1]
    return [*classes, Class(edges[-1], math.inf, beyond)] if beyond else classes


def histogram(
    title: str, values: Sequence[float], *, x_label: str, y_label: str, unit: str = "", levels: Mapping[str, float]
) -> Html:
    """How often values fell into each class; levels: name -> a value that a dashed line marks, such as the median."""
    height, top, foot, left = 292, 36, 244, 62
    if not values:
        text = label(WIDTH / 2, height / 2, "nothing was recorded")
        return figure(title, [], [text], height=height, description="nothing was recorded")
    classes = classes_of(values)
    closed = [one for one in classes if math.isfinite(one.high)]
    tail = classes[len(closed) :]
    divisor, unit_name = fitting(unit, closed[-1].high)
    across = Scale(closed[0].low / divisor, closed[-1].high / divisor, left, _RIGHT - (52 if tail else 0))
    up = Scale(0, 1.06 * max(one.count for one in classes), foot, top)
    body = [label(0, 14, y_label, anchor="start", kind="strong")]
    for value in ticks(0, up.high, count=4, whole=True):
        body += [line(left, up.at(value), _RIGHT, up.at(value), "rule")]
        body += [label(left - 8, up.at(value) + 4.5, tick_text(value), anchor="end")]
    for one in closed:
        said = f"{value_text(one.low, unit)} to {value_text(one.high, unit)}: {one.count:,}"
        body += _column(across.at(one.low / divisor), across.at(one.high / divisor), up, one.count, said, "f0")
    for one in tail:
        said = f"above {value_text(one.low, unit)}: {one.count:,}"
        body += _column(_RIGHT - 36, _RIGHT, up, one.count, said, "f1 over")
        body += [label(_RIGHT - 18, foot + 21, f"> {tick_text(round(one.low / divisor, 9))}")]
    for value in ticks(across.low, across.high):
        body += [line(across.at(value), foot, across.at(value), foot + 5, "zero")]
        body += [label(across.at(value), foot + 21, tick_text(value))]
    body += [
        line(left, foot, _RIGHT, foot, "zero"),
        label((left + _RIGHT) / 2, height - 6, f"{x_label} ({unit_name})", kind="strong"),
    ]
    body += _levels({name: across.at(value / divisor) for name, value in levels.items()}, left, top, foot)
    symbol = '<line class="level" x1="1" y1="5" x2="21" y2="5"/>'
    keys = [key(f"{name} {value_text(value, unit)}", symbol) for name, value in levels.items()]
    described = f"{len(values):,} values from {value_text(min(values), unit)} to {value_text(max(values), unit)}"
    return figure(title, keys, body, height=height, description=described)


def _levels(places: Mapping[str, float], left: float, top: float, foot: float) -> list[str]:
    """Dashed lines at the pixels `places`, named above where there is room."""
    body: list[str] = []
    taken: list[tuple[float, float]] = []
    for name, x in sorted(places.items(), key=lambda pair: pair[0] != "median"):  # which is named if not all can be
        half = 4.6 * len(name) + 2
        if left <= x <= _RIGHT:
            body.append(line(x, top, x, foot, "level"))
            if all(abs(x - place) >= half + other for place, other in taken):
                body.append(label(x, top - 5, name))
                taken.append((x, half))
    return body


def _column(left: float, right: float, up: Scale, count: int, said: str, kind: str) -> list[str]:
    if count == 0:
        return []
    y = min(up.at(count), up.first - 1.5)  # one value among a hundred thousand is seen too
    return [
        f'<rect class="bar {kind}" x="{left + 0.5:g}" y="{y:g}" width="{max(right - left - 1, 0.5):g}" '
        f'height="{round(up.first - y, 1):g}"><title>{escape(said)}</title></rect>'
    ]

# SPDX-License-Identifier: Apache-2.0
"""Charts: round ticks, fitting units, thousands of points without losing an extreme, gaps that are seen."""

from __future__ import annotations

import itertools
import math
import random
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_megatron.measure.decimation import XY, decimate, finite
from lora_megatron.measure.html_page import Html
from lora_megatron.measure.svg_axes import Scale, fitting, log_ticks, tick_text, ticks, value_text
from lora_megatron.measure.svg_bars import Bar, classes_of, histogram, stacked_bars
from lora_megatron.measure.svg_lines import Series, line_chart


def picture(chart: Html) -> ElementTree.Element:
    """The chart's own SVG, after those of its keys."""
    found = re.findall(r"<svg.*?</svg>", chart, re.DOTALL)
    return ElementTree.fromstring(found[-1])


def texts(chart: Html) -> list[str]:
    return [element.text or "" for element in picture(chart).iter("text")]


def titles(chart: Html) -> list[str]:
    return [element.text or "" for element in picture(chart).iter("title")]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.13, 0.97, [0.2, 0.4, 0.6, 0.8]),
        (0, 240, [0, 50, 100, 150, 200]),
        (-3, 3, [-2, 0, 2]),
        (0, 2e-6, [0, 5e-7, 1e-6, 1.5e-6, 2e-6]),
        (0, 4e15, [0, 1e15, 2e15, 3e15, 4e15]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@settings(deadline=None)
@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e9))
def test_ticks_are_few_and_within(low: float, share: float) -> None:
    span = share * max(abs(low), 1e-12)  # a chart's axis is never narrower
    found = ticks(low, low + span)
    assert len(found) <= 7
    slack = 1e-3 * span + 1e-14 * abs(low)
    assert all(low - slack <= value <= low + span + slack for value in found)


def test_steps_get_whole_ticks() -> None:
    assert ticks(0, 3, whole=True) == [0, 1, 2, 3]
    assert ticks(1, 2, whole=True) == [1, 2]


def test_a_logarithmic_axis_has_powers_of_ten() -> None:
    assert log_ticks(0.05, 8) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2, 5])
    assert len(log_ticks(1e-12, 1e12)) <= 7
    scale = Scale(0.01, 100, 0, 400, log=True)
    assert [scale.at(value) for value in (0.01, 0.1, 1, 10, 100)] == [0, 100, 200, 300, 400]


def test_numbers_are_short_and_units_fit() -> None:
    assert [tick_text(v) for v in (0, 0.05, 1200, 40_000, 2.5e6, 2e-6)] == ["0", "0.05", "1,200", "40k", "2.5M", "2e-6"]
    assert tick_text(3e21) == "3e21"
    assert fitting("bytes", 3 * 2**30) == (2**30, "GiB")
    assert fitting("s", 0.02) == (1e-3, "ms")
    assert fitting("s", 7200) == (60.0, "min")
    assert fitting("s", 4e4) == (3600.0, "h")
    assert fitting("parrots", 7) == (1.0, "parrots")
    assert value_text(0.1114, "s") == "111 ms"
    assert value_text(1536, "bytes") == "1.50 KiB"
    assert value_text(5.14728, "nats per token") == "5.147 nats per token"


@settings(deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=3000), st.integers(8, 200))
def test_decimation_keeps_extremes_ends_and_gaps(values: list[float | None], most: int) -> None:
    points: list[XY] = [(float(x), y) for x, y in enumerate(values)]
    kept = decimate(points, most=most)
    assert len(kept) <= max(most, 8)
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})
    assert set(kept) <= set(points)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    known, known_kept = ([y for _, y in some if y is not None] for some in (points, kept))
    assert (min(known, default=0), max(known, default=0)) == (min(known_kept, default=0), max(known_kept, default=0))
    assert any(y is None for y in values) == any(y is None for _, y in kept)


def test_a_spike_and_a_gap_among_a_hundred_thousand_steps_are_drawn() -> None:
    noise = random.Random(1)
    points: list[XY] = [(step, noise.random()) for step in range(1, 100_001)]
    points[61_803] = (61_804, 50.0)
    points[27_182] = (27_183, None)
    chart = line_chart("Loss", [Series("training", points)], y_label="loss")
    assert len(chart) < 60_000
    assert sum("no finite value: step 27183" in title for title in titles(chart)) == 1
    assert sum("50" in title.split(" to ")[-1] for title in titles(chart) if title.startswith("steps 6")) == 1
    path = next(e for e in picture(chart).iter("path")).get("d", "")
    assert path.count("M") == 2
    highest = min(float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path))
    assert highest < 60  # the rest lies near the foot, at 244


def test_values_that_are_no_numbers_leave_gaps() -> None:
    assert [finite(value) for value in (1, 2.5, None, math.nan, math.inf, -math.inf, 1e305)] == [1, 2.5] + [None] * 5
    assert finite(True) is None
    points: list[XY] = [(1, 1.0), (2, None), (3, None), (4, 2.0), (5, 3.0), (6, None), (7, 4.0)]
    chart = line_chart("Loss", [Series("training", points)], y_label="loss")
    assert [title for title in titles(chart) if title.startswith("no finite")] == [
        "no finite value: steps 2 to 3",
        "no finite value: step 6",
    ]
    assert texts(chart).count("×") == 2
    path = next(e for e in picture(chart).iter("path")).get("d", "")
    assert (path.count("M"), path.count("L"), path.count("h0")) == (3, 1, 2)  # a dot, a line, a dot


def test_gaps_of_every_other_step_stay_few() -> None:
    points: list[XY] = [(step, 1.0 + step if step % 2 else None) for step in range(20_000)]
    chart = line_chart("Loss", [Series("training", points)], y_label="loss")
    marked = [title for title in titles(chart) if title.startswith("no finite")]
    assert marked == ["no finite value: some of steps 0 to 19998"]
    assert len(chart) < 60_000


@pytest.mark.parametrize(
    "points", [[(1, 2.0)], [(1, 0.0)], [(5, -3.0)], [(1, 7.0), (2, 7.0)], [(1, 1e299), (2, -1e299)]]
)
def test_one_point_or_a_flat_line_is_a_chart(points: list[XY]) -> None:
    chart = line_chart("x", [Series("y", points)], y_label="y", from_zero=True, may_be_log=True)
    assert "nan" not in chart
    assert "inf" not in chart
    assert len([text for text in texts(chart) if text]) > 3


def test_a_chart_of_nothing_says_so() -> None:
    assert "nothing was recorded" in texts(line_chart("x", [Series("y", [])], y_label="y"))
    assert "no finite value was recorded" in texts(line_chart("x", [Series("y", [(1, None)])], y_label="y"))
    assert "nothing was recorded" in texts(stacked_bars("x", [], x_label="y"))
    assert "nothing was recorded" in texts(histogram("x", [], x_label="x", y_label="y", levels={}))


def test_names_are_text_in_charts() -> None:
    chart = line_chart("<b>&", [Series("<i>", [(1, 1.0)]), Series("&", [(1, 2.0)])], y_label="<y>", unit="<u>")
    bars = stacked_bars("<b>", [Bar("<rank>", {"<kind>": 1.0, "&": 2.0})], x_label="<x>")
    for markup in (chart, bars):
        assert not re.search(r"<(b|i|y|u|rank|kind|x)>(?!T)", markup.replace("<b>&lt;b&gt;", ""))
    assert "<y> (<u>)" in texts(chart)


@settings(deadline=None)
@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=300))
def test_every_value_falls_into_one_class(values: list[float]) -> None:
    classes = classes_of(values)
    assert sum(one.count for one in classes) == len(values)
    assert len(classes) <= 30
    assert all(a.high == b.low for a, b in itertools.pairwise(classes))


def test_classes_are_round_and_counted_right() -> None:
    values = [0.1 + 0.0007 * index for index in range(100)] + [9.0]
    classes = classes_of(values)
    for one in classes:
        inside = [value for value in values if one.low <= value < one.high]
        assert one.count == len(inside)
    assert (classes[-1].high, classes[-1].count) == (math.inf, 1)  # a first step of 9 s does not flatten the others
    assert classes[0].high - classes[0].low == pytest.approx(0.005)


def test_a_histogram_tells_its_counts() -> None:
    values = [0.1 + 0.0007 * index for index in range(100)] + [9.0]
    chart = histogram("Step time", values, x_label="time", y_label="steps", unit="s", levels={"median": 0.135})
    counts = [int(title.rsplit(": ", 1)[1]) for title in titles(chart)[1:]]
    assert sum(counts) == 101
    assert titles(chart)[-1].startswith("above ")
    assert "median" in texts(chart)
    assert "time (ms)" in texts(chart)


def test_bars_are_as_long_as_they_say() -> None:
    bars = [Bar("rank 0", {"weights": 3 * 2**20, "optimizer": 2**20}), Bar("rank 1", {"weights": 2**20}, limit=2**21)]
    chart = stacked_bars("Memory", bars, x_label="memory", unit="bytes", limit_name="reserved")
    widths = {rect.findtext("title"): float(rect.get("width", "nan")) for rect in picture(chart).iter("rect")}
    assert set(widths) == {"rank 0, weights: 3.00 MiB", "rank 0, optimizer: 1.00 MiB", "rank 1, weights: 1.00 MiB"}
    weights, optimizer, _ = picture(chart).iter("rect")
    assert float(optimizer.get("x", "nan")) == pytest.approx(
        float(weights.get("x", "nan")) + widths["rank 0, weights: 3.00 MiB"]
    )
    long, *short = widths.values()
    assert [long / width for width in short] == pytest.approx([3, 3], rel=0.01)
    assert {"rank 0", "rank 1", "4.00 MiB", "1.00 MiB", "memory (MiB)"} <= set(texts(chart))
    assert [line.get("class") for line in picture(chart).iter("line")].count("limit") == 1
    assert "reserved" in chart


def test_a_long_name_leaves_room_for_its_bar() -> None:
    chart = stacked_bars("Memory", [Bar("a very long name " * 9, {"weights": 7.0})], x_label="memory")
    bar = next(picture(chart).iter("rect"))
    assert float(bar.get("width", "nan")) > 200
    assert (bar.findtext("title") or "").startswith("a very long name " * 9)
    assert "a very long name a very long …" in texts(chart)

# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of the measured cases side by side, as PNG; extrapolated and planned bars are hatched."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from lora_megatron.bench.results import Row
from lora_megatron.measure.atomic import write_bytes
from lora_megatron.measure.svg_axes import fitting
from lora_megatron.measure.units import show_bytes, show_count

_KINDS = (
    ("frozen weights", "#56B4E9"),
    ("trained weights", "#0072B2"),
    ("gradients", "#E69F00"),
    ("optimizer", "#D55E00"),
    ("activations", "#009E73"),
)
_SPEED = "#0072B2"
_HATCH = "////"
_OVER_LINES: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.6}
"""Behind a label, which may stand on the device's line."""


def draw_bench(path: Path, rows: Sequence[Row], *, title: str, device_bytes: int | None) -> None:
    """Write a picture: tokens/s per rank of each row on the left, memory of its largest rank on the right.

    device_bytes: a line at the memory of a device, where that is near what was used.
    """
    height = 2.1 + 0.75 * len(rows)
    figure = Figure(figsize=(13, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    speed, memory = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.25))
    names = [_name(row) for row in rows]
    _draw_speed(speed, rows)
    _draw_memory(memory, rows, device_bytes)
    speed.set_yticks(range(len(rows)), names, fontsize=11)
    speed.set_ylim(len(rows) - 0.45, -0.55)
    for axes in (speed, memory):
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(facecolor=colour, label=kind) for kind, colour in _KINDS]
    figure.legend(handles=handles, fontsize=10, frameon=False, loc="outside lower right", ncols=len(handles))
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    write_bytes(path, content.getvalue())


def _name(row: Row) -> str:
    sizes = row["extrapolated_from"]
    how = f"\n(extrapolated from {sizes[0]} and {sizes[1]})" if sizes else ""
    return f"{row['method']}, {row['layers']} layer{'s' if row['layers'] > 1 else ''}{how}"


def _draw_speed(axes: Axes, rows: Sequence[Row]) -> None:
    rates = [row.get("tokens_per_second_per_rank") or 0.0 for row in rows]
    for place, (row, rate) in enumerate(zip(rows, rates, strict=True)):
        if row["out_of_memory"]:
            axes.text(0, place, f"  {row['out_of_memory']}", va="center", fontsize=10, color="#a00000")
            continue
        axes.barh(place, rate, height=0.6, color=_SPEED, alpha=0.9, **_looks(bool(row["extrapolated_from"])))
        share = row["share_of_ceiling"]
        ceiling = f", {100 * share:.0f}% of the ceiling" if share else ""
        axes.text(rate, place, f" {show_count(rate)}{ceiling}", va="center", fontsize=10)
    axes.set_xlim(0, 1.45 * max([*rates, 1e-9]))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("tokens per second and rank (ceiling: matrix products alone)", fontsize=11)


def _looks(hatched: bool) -> dict[str, Any]:
    return {"hatch": _HATCH, "edgecolor": "white", "linewidth": 0} if hatched else {"linewidth": 0}


def _draw_memory(axes: Axes, rows: Sequence[Row], device_bytes: int | None) -> None:
    """Measured above planned, both stacked by kind; an extrapolated row has a peak and no kinds."""
    largest = max([*(row["peak_bytes"] or 0 for row in rows), *(row["planned_peak_bytes"] or 0 for row in rows), 1])
    unit, name = fitting("bytes", largest)
    for place, row in enumerate(rows):
        if row["memory_by_rank"]:
            measured = max(row["memory_by_rank"], key=lambda rank: rank["peak"])
            _stack(axes, place - 0.17, measured, unit, hatched=False)
        elif row["peak_bytes"]:
            axes.barh(place - 0.17, row["peak_bytes"] / unit, height=0.3, color="#999999", **_looks(True))
        if row["peak_bytes"]:
            text = f" {show_bytes(row['peak_bytes'])}"
            axes.text(row["peak_bytes"] / unit, place - 0.17, text, va="center", fontsize=9, bbox=_OVER_LINES)
        if row["planned_by_rank"]:
            planned = max(row["planned_by_rank"], key=lambda rank: rank["peak"])
            _stack(axes, place + 0.17, planned, unit, hatched=True)
            text = f" {show_bytes(planned['peak'])} planned"
            place_of_text = planned["peak"] / unit, place + 0.17
            axes.text(*place_of_text, text, va="center", fontsize=9, color="#444444", bbox=_OVER_LINES)
    limit = 1.3 * largest
    if device_bytes is not None and device_bytes < 2 * largest:
        axes.axvline(device_bytes / unit, color="#a00000", linestyle="--", linewidth=1.2)
        axes.text(device_bytes / unit, -0.5, " device", color="#a00000", fontsize=9, va="top")
        limit = max(limit, 1.15 * device_bytes)
    axes.set_xlim(0, limit / unit)
    axes.set_xlabel(f"memory of the largest rank ({name}); hatched: planned", fontsize=11)


def _stack(axes: Axes, place: float, memory: dict[str, int], unit: float, *, hatched: bool) -> None:
    sizes = (
        memory["weights"] - memory["trained"],
        memory["trained"],
        memory["gradients"],
        memory["optimizer"],
        memory["activations"],
    )
    left = 0.0
    for size, (_, colour) in zip(sizes, _KINDS, strict=True):
        axes.barh(place, size / unit, left=left, height=0.3, color=colour, **_looks(hatched))
        left += size / unit

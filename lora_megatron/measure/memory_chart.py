# SPDX-License-Identifier: Apache-2.0
"""Memory by kind as a PNG of stacked bars, side by side for two methods, with the GPU's memory as a line."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_megatron.measure.atomic import write_bytes

# Okabe and Ito's, which colour-blind readers can tell apart; what is held all the time comes first.
_COLOURS = ("#0072B2", "#56B4E9", "#CC79A7", "#D55E00", "#009E73", "#F0E442", "#E69F00", "#999999", "#444444")
_HATCHES = ("", "//")
_GIB = 2**30


@dataclass(frozen=True)
class Bars:
    """One method: a stack of bytes by kind for each group, in the groups' order."""

    name: str
    stacks: Sequence[Mapping[str, float]]


def draw_memory(
    path: Path, methods: Sequence[Bars], *, groups: Sequence[str], title: str, limit: float, limit_label: str
) -> None:
    """Write a PNG (1650 pixels wide): for every group a bar a method, stacked by kind; `limit` is in bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second to load, at the end of a run
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(methods)
    kinds = list(methods[0].stacks[0])
    for index, bars in enumerate(methods):
        places = [group + (index - (len(methods) - 1) / 2) * width for group in range(len(groups))]
        bottoms = [0.0] * len(groups)
        for kind, colour in zip(kinds, _COLOURS, strict=True):
            heights = [stack[kind] / _GIB for stack in bars.stacks]
            axes.bar(
                places,
                heights,
                width * 0.94,
                bottom=bottoms,
                color=colour,
                hatch=_HATCHES[index % len(_HATCHES)],
                edgecolor="white",
                linewidth=0.4,
                label=kind if index == 0 else None,
            )
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        for place, top in zip(places, bottoms, strict=True):
            axes.annotate(
                f"{bars.name} {top:,.0f}" if top >= 100 else f"{bars.name} {top:.3g}",
                (place, top),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=9,
                rotation=90,
            )
    axes.axhline(limit / _GIB, color="#000000", linestyle="--", linewidth=1.4)
    axes.annotate(
        limit_label,
        (1, limit / _GIB),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        fontsize=10,
    )
    tallest = max(sum(stack.values()) for bars in methods for stack in bars.stacks) / _GIB
    axes.set_ylim(0, max(tallest * 1.28, limit / _GIB * 1.1))
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_xticks(range(len(groups)), groups, fontsize=10)
    axes.set_ylabel("GiB on each rank", fontsize=12)
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=10, frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    write_bytes(path, content.getvalue())

# SPDX-License-Identifier: Apache-2.0
"""Loss curves as PNG, with matplotlib's file backend: no display is needed.

The colours are Okabe and Ito's, which colour-blind readers can tell apart; each run also has a marker of its own.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_megatron.measure.atomic import write_bytes

Point = Sequence[float | None]
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_MARKERS = ("o", "s", "^", "D")
_SMOOTHING_REACH = 1 / 60  # of the curve's length: far enough to calm the noise, too near to hide a jump


@dataclass(frozen=True)
class Curves:
    """One run: [step, loss] points, loss in nats per token; points without a finite loss are left out."""

    train: Sequence[Point] = ()
    held_out: Sequence[Point] = ()


def smooth(values: Sequence[float]) -> list[float]:
    """Mean of the neighbours on both sides; unlike a trailing average it does not lag.

    At the steep start both sides shrink alike, or the slope would bias it; at the flat end only the right side does.
    """
    sums = [0.0, *itertools.accumulate(values)]
    result = []
    for index in range(len(values)):
        reach = min(round(len(values) * _SMOOTHING_REACH), index)
        first, last = index - reach, min(index + reach, len(values) - 1)
        result.append((sums[last + 1] - sums[first]) / (last + 1 - first))
    return result


def draw_losses(
    path: Path, runs: Mapping[str, Curves], *, title: str, base_loss: float | None = None, base_label: str = "base"
) -> None:
    """Write a PNG (1500 x 900 pixels): training loss thin, smoothed thick, held-out loss as marked points.

    base_loss: a dashed line at the held-out loss before any training.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second to load, at the end of a run
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (name, curves) in enumerate(runs.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        steps, losses = _columns(curves.train)
        if steps:
            axes.plot(steps, losses, color=colour, linewidth=0.7, alpha=0.35)
            axes.plot(steps, smooth(losses), color=colour, linewidth=2, label=f"{name}: training (smoothed)")
        steps, losses = _columns(curves.held_out)
        if steps:
            axes.plot(
                steps,
                losses,
                color=colour,
                linestyle="none",  # nothing was measured between the points
                marker=_MARKERS[index % len(_MARKERS)],
                markersize=11 - 3 * index,  # runs that agree stay visible one inside the other
                markeredgecolor="white",
                zorder=3 + index,
                label=f"{name}: held-out",
            )
    if base_loss is not None and math.isfinite(base_loss):
        axes.axhline(base_loss, color="#555555", linestyle="--", linewidth=1.2, label=f"{base_label}: held-out")
    axes.set_title(title, loc="left", fontsize=14, fontweight="bold")
    axes.set_xlabel("step", fontsize=12)
    axes.set_ylabel("loss (nats per token)", fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=11, frameon=False)
    else:
        axes.text(0.5, 0.5, "no finite loss was recorded", transform=axes.transAxes, ha="center", fontsize=12)
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    write_bytes(path, content.getvalue())


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    pairs = [(float(s), float(l)) for s, l in points if s is not None and l is not None and math.isfinite(l)]
    return [step for step, _ in pairs], [loss for _, loss in pairs]

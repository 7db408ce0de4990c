# SPDX-License-Identifier: Apache-2.0
"""Two or more runs beside each other as `report.html`: the table, their losses in one picture, memory, texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_megatron.measure import html_page
from lora_megatron.measure.curves import Curves
from lora_megatron.measure.decimation import XY, finite
from lora_megatron.measure.html_page import Section
from lora_megatron.measure.html_report import noisy
from lora_megatron.measure.memory_bars import memory_bars
from lora_megatron.measure.svg_lines import Series, line_chart


def write_html_comparison(
    folder: Path,
    title: str,
    *,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    curves: Mapping[str, Curves],
    base_loss: float | None,
    memory: Mapping[str, Sequence[Mapping[str, Any]]],
    memory_note: str,
    samples: Sequence[Mapping[str, str | None]],
    texts: Mapping[str, str],
    setting: Sequence[Sequence[str]],
) -> Path:
    """Write `report.html` into `folder`; the same arguments give the same bytes.

    columns, rows: the table. curves, memory: label of a run -> its losses and its `memory_by_rank`. base_loss: held-out
    loss before any training. texts: see `html_page.samples`. setting: (what, value) rows.
    """
    loss = line_chart("Loss", _losses(curves, base_loss), y_label="loss", unit="nats per token", may_be_log=True)
    bars = memory_bars("Memory by kind and rank", memory)
    note = html_page.paragraph(memory_note, kind="note")
    sections = [
        Section("Comparison", [html_page.table(columns, rows)]),
        Section("Loss and memory", [html_page.side_by_side(loss, bars), note]),
        Section("Generated text", html_page.samples(samples, texts)),
        Section("Setting", [html_page.table(["", ""], setting, numbers=False)]),
    ]
    return html_page.write_html(folder, title, sections)


def _losses(curves: Mapping[str, Curves], base_loss: float | None) -> list[Series]:
    series: list[Series] = []
    for colour, (name, run) in enumerate(curves.items()):
        series += noisy(name, _points(run.train), colour=colour)
        series.append(Series(f"{name}, held-out", _points(run.held_out), style="marks", colour=colour))
    steps = [x for one in series for x, _ in one.points]
    if finite(base_loss) is not None and steps:
        ends: list[XY] = [(min(steps), base_loss), (max(steps), base_loss)]
        series.append(Series("base, not adapted, held-out", ends, style="dash", colour=2))
    return series


def _points(curve: Sequence[Sequence[float | None]]) -> list[XY]:
    return [(step, finite(loss)) for step, loss in curve if step is not None]

# SPDX-License-Identifier: Apache-2.0
"""The bench as one HTML page: the same tables and sentences, and bars of speed and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_megatron.bench.notes import memory_note, notes, setting, yaml_of
from lora_megatron.bench.results import Row, layers_text
from lora_megatron.bench.tables import case_table, comparison_table, memory_table, products_table
from lora_megatron.measure.html_page import Html, Section, folded, paragraph, side_by_side, table, tiles, write_html
from lora_megatron.measure.memory_bars import memory_bars
from lora_megatron.measure.svg_bars import Bar, stacked_bars


def write_page(folder: Path, title: str, result: Mapping[str, Any]) -> None:
    """Write `report.html` of a bench's result into `folder`."""
    rows = result["rows"]
    charts = side_by_side(_speed_bars(rows), _memory_bars(rows))
    sections = [
        Section("Methods side by side", [table(*comparison_table(result["headline"], result["ratios"])), charts]),
        Section("What the numbers are", [paragraph(note) for note in notes(result)]),
        Section("Every case", [table(*case_table(rows))]),
        Section("Memory of the largest rank", [paragraph(memory_note(result)), table(*memory_table(rows))]),
        Section("Matrix products", [table(*products_table(result["gemm"]))]),
        Section("Setting", [table(["", "value"], setting(result), numbers=False), _configuration(result)]),
    ]
    write_html(folder, "Bench", sections, subtitle=title, lead=_tiles(result["ratios"]))


def _tiles(ratios: Sequence[Row]) -> list[Html]:
    if not ratios:
        return []
    last = [ratio for ratio in ratios if ratio["layers"] == ratios[-1]["layers"]]
    return [
        tiles(
            [
                item
                for ratio in last
                for item in (
                    (f"{ratio['method']}: speed", f"{ratio['speed']:.2f}x", f"of {ratio['to']}, {_where(ratio)}"),
                    (f"{ratio['method']}: peak memory", f"{ratio['peak_memory']:.3g}x", f"of {ratio['to']}"),
                )
            ]
        )
    ]


def _where(ratio: Row) -> str:
    return f"{ratio['layers']} layers{', extrapolated' if ratio['extrapolated'] else ''}"


def _speed_bars(rows: Sequence[Row]) -> Html:
    bars = [
        Bar(_name(row), {"tokens": row.get("tokens_per_second_per_rank") or 0.0}, remark=row["out_of_memory"] or "")
        for row in rows
    ]
    return stacked_bars("Speed", bars, x_label="tokens per second and rank")


def _memory_bars(rows: Sequence[Row]) -> Html:
    largest = {
        _name(row): [max(row["memory_by_rank"], key=lambda rank: rank["peak"])] for row in rows if row["memory_by_rank"]
    }
    return memory_bars("Memory of the largest rank", largest)


def _name(row: Row) -> str:
    return f"{row['method']}, {layers_text(row)}"


def _configuration(result: Mapping[str, Any]) -> Html:
    rows = [line.partition(":")[::2] for line in yaml_of(result).splitlines()]
    return folded("Configuration", table(["", "value"], [[key, value] for key, value in rows], numbers=False))

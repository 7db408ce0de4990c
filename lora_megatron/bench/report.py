# SPDX-License-Identifier: Apache-2.0
"""The bench as report.json (all numbers), report.md and report.html (for people), a picture, and on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from lora_megatron.bench.chart import draw_bench
from lora_megatron.bench.notes import memory_note, notes, setting, yaml_of
from lora_megatron.bench.page import write_page
from lora_megatron.bench.results import layers_text
from lora_megatron.bench.tables import case_table, comparison_table, memory_table, products_table
from lora_megatron.measure import console, markdown
from lora_megatron.measure.atomic import write_json, write_text
from lora_megatron.measure.html_page import HTML_NAME
from lora_megatron.measure.report_folder import JSON_NAME, MARKDOWN_NAME

PICTURE_NAME = "bench.png"
FILES = (JSON_NAME, MARKDOWN_NAME, HTML_NAME, PICTURE_NAME, "config.yaml", "environment.json")
KIND = "bench"


def write_bench(folder: Path, result: Mapping[str, Any]) -> None:
    """Write the report of `result` (see `commands.bench`) into `folder`; each file appears whole or not at all.

    While a bench runs, report.json and report.md say what is known so far; the picture and the page come at its end.
    """
    if result["complete"]:
        title, device_bytes = title_of(result), result["device_memory_bytes"]
        draw_bench(folder / PICTURE_NAME, result["rows"], title=title, device_bytes=device_bytes)
        write_page(folder, title, result)
    else:
        for name in (PICTURE_NAME, HTML_NAME):
            (folder / name).unlink(missing_ok=True)  # of an earlier bench
    write_text(folder / MARKDOWN_NAME, "\n".join(_lines(result)))
    write_json(folder / JSON_NAME, dict(result))


def title_of(result: Mapping[str, Any]) -> str:
    """`lora, full: 24 layers of width 1024, sequence 512, bf16, one process`."""
    shape, data = result["shape"], result["data"]
    return (
        f"{', '.join(result['methods'])}: {shape['num_layers']} layers of width {shape['hidden_size']}, "
        f"{data['micro_batch_size']} x {data['sequence_length']} tokens, {result['precision']}, "
        f"{markdown.layout_text(result['layout'])}, {result['device']}"
    )


def print_bench(result: Mapping[str, Any], *, stream: TextIO | None = None) -> None:
    """The tables of the report on the terminal."""
    columns, rows = comparison_table(result["headline"], result["ratios"])
    console.print_table(title_of(result), columns, rows, stream=stream)
    columns, rows = memory_table(result["rows"])
    console.print_table("Memory of the largest rank: measured, and plan against it", columns, rows, stream=stream)


def _lines(result: Mapping[str, Any]) -> list[str]:
    lines = [f"# {markdown.escape('Bench: ' + title_of(result))}", ""]
    if not result["complete"]:
        lines += ["**Not complete: the bench is still running, or was ended before its last step.**", ""]
    lines += markdown.table(*comparison_table(result["headline"], result["ratios"]))
    lines += [f"![Speed and memory of the methods]({PICTURE_NAME})", ""] if result["complete"] else []
    lines += [*(f"- {markdown.escape(note)}" for note in notes(result)), "", "## Every case", ""]
    lines += markdown.table(*case_table(result["rows"]))
    lines += ["## Memory of the largest rank", "", memory_note(result), ""]
    lines += markdown.table(*memory_table(result["rows"]))
    lines += ["## Memory of every rank", ""]
    ranks = [
        line
        for row in result["rows"]
        for line in markdown.memory_rows(row["memory_by_rank"] or (), f"{row['method']}, {layers_text(row)}")
    ]
    lines += markdown.table(["case", "rank", *markdown.MEMORY_KINDS], ranks)
    lines += ["## Matrix products", "", *markdown.table(*products_table(result["gemm"]))]
    lines += ["## Setting", "", *markdown.table(["", "value"], setting(result), numbers=False)]
    return [*lines, "## Configuration", "", "```yaml", *yaml_of(result).splitlines(), "```", ""]

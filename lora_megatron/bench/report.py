# SPDX-License-Identifier: Apache-2.0
"""The bench as report.json (all numbers), report.md (for people), a picture, and tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from lora_megatron.bench.chart import draw_bench
from lora_megatron.bench.notes import memory_note, notes, setting, yaml_of
from lora_megatron.bench.results import COMPARED_KINDS, Row
from lora_megatron.measure import console, markdown
from lora_megatron.measure.atomic import write_json, write_text
from lora_megatron.measure.units import MISSING, show_bytes, show_count, show_seconds

PICTURE_NAME = "bench.png"
JSON_NAME, MARKDOWN_NAME = "report.json", "report.md"
FILES = (JSON_NAME, MARKDOWN_NAME, PICTURE_NAME, "config.yaml", "environment.json")
KIND = "bench"


def write_bench(folder: Path, result: Mapping[str, Any]) -> None:
    """Write the report of `result` (see `commands.bench`) into `folder`; each file appears whole or not at all."""
    rows: list[Row] = result["rows"]
    if rows:
        draw_bench(folder / PICTURE_NAME, rows, title=title_of(result), device_bytes=result["device_memory_bytes"])
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


def comparison_table(rows: Sequence[Row], ratios: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: a column a method, and beside it what it is to the reference."""
    entries = [
        ("step, median", lambda r: _seconds(r, "step_seconds")),
        ("step, p10 to p90", _spread),
        ("forward and backward", lambda r: _seconds(r, "forward_backward_seconds")),
        ("optimizer", lambda r: _seconds(r, "optimizer_seconds")),
        ("tokens per second and rank", lambda r: show_count(r.get("tokens_per_second_per_rank"))),
        ("model TFLOP/s per rank", lambda r: _tera(r.get("model_flops_per_second_per_rank"))),
        ("hardware TFLOP/s per rank", lambda r: _tera(r.get("hardware_flops_per_second_per_rank"))),
        ("ceiling of matrix products, TFLOP/s", lambda r: _tera(r.get("ceiling_flops_per_second"))),
        ("share of the ceiling", lambda r: _percent(r.get("share_of_ceiling"))),
        ("peak memory of the largest rank", lambda r: show_bytes(r["peak_bytes"])),
        ("the same as planned", lambda r: show_bytes(r["planned_peak_bytes"])),
        ("trained parameters", lambda r: show_count(r.get("trainable_parameters"))),
    ]
    table = [[label, *(r["out_of_memory"] or show(r) for r in rows)] for label, show in entries]
    for ratio in _of_headline(ratios, rows):
        label = f"{ratio['method']} to {ratio['to']}"
        table.append([f"{label}: speed", *_in_column(rows, ratio, f"{ratio['speed']:.2f}x")])
        table.append([f"{label}: peak memory", *_in_column(rows, ratio, f"{ratio['peak_memory']:.3g}x")])
    return ["", *(f"{row['method']}, {_layers(row)}" for row in rows)], table


def _of_headline(ratios: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    return [ratio for ratio in ratios if any(row["layers"] == ratio["layers"] for row in rows)]


def _in_column(rows: Sequence[Row], ratio: Row, text: str) -> list[str]:
    return [text if row["method"] == ratio["method"] else "" for row in rows]


def case_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: a row a case, with its speed."""
    columns = ["case", "step", "p10 to p90", "forward, backward", "optimizer", "tokens/s/rank", "model TFLOP/s"]
    columns += ["hardware TFLOP/s", "of ceiling"]
    table = [
        [
            f"{row['method']}, {_layers(row)}",
            row["out_of_memory"] or _seconds(row, "step_seconds"),
            _spread(row),
            _seconds(row, "forward_backward_seconds"),
            _seconds(row, "optimizer_seconds"),
            show_count(row.get("tokens_per_second_per_rank")),
            _tera(row.get("model_flops_per_second_per_rank")),
            _tera(row.get("hardware_flops_per_second_per_rank")),
            _percent(row.get("share_of_ceiling")),
        ]
        for row in rows
    ]
    return columns, table


def memory_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: bytes by kind of each case's largest rank, and how far the plan is off."""
    table = []
    for row in rows:
        if not row["memory_by_rank"]:
            continue
        largest = max(row["memory_by_rank"], key=lambda rank: rank["peak"])
        name = f"{row['method']}, {_layers(row)}"
        table.append([name, *(show_bytes(largest[kind]) for kind in (*COMPARED_KINDS, "reserved"))])
        errors = row["plan_error"]
        table.append(["  planned / measured", *(_signed(errors[kind]) for kind in COMPARED_KINDS), ""])
    return ["case", "weights", "of them trained", *COMPARED_KINDS[2:], "reserved"], table


def _lines(result: Mapping[str, Any]) -> list[str]:
    lines = [f"# {markdown.escape('Bench: ' + title_of(result))}", ""]
    if not result["complete"]:
        lines += ["**Not complete: the bench is still running, or was ended before its last step.**", ""]
    lines += markdown.table(*comparison_table(result["headline"], result["ratios"]))
    lines += [f"![Speed and memory of the methods]({PICTURE_NAME})", ""] if result["rows"] else []
    lines += [*(f"- {markdown.escape(note)}" for note in notes(result)), "", "## Every case", ""]
    lines += markdown.table(*case_table(result["rows"]))
    lines += ["## Memory of the largest rank", "", memory_note(result), ""]
    lines += markdown.table(*memory_table(result["rows"]))
    lines += ["## Memory of every rank", ""]
    ranks = [
        line
        for row in result["rows"]
        for line in markdown.memory_rows(row["memory_by_rank"] or (), f"{row['method']}, {_layers(row)}")
    ]
    lines += markdown.table(["case", "rank", *markdown.MEMORY_KINDS], ranks)
    lines += ["## Matrix products", "", *markdown.table(*_products_table(result["gemm"]))]
    lines += ["## Setting", "", *markdown.table(["", "value"], setting(result), numbers=False)]
    return [*lines, "## Configuration", "", "```yaml", *yaml_of(result).splitlines(), "```", ""]


def _products_table(gemm: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    after = {(p["linear"], p["kind"]): p["flops_per_second"] for p in gemm["after"]}
    table = [
        [
            f"{p['linear']} {p['kind']}",
            f"{p['m']} x {p['in_features']} x {p['out_features']}",
            _tera(p["flops_per_second"]),
            _tera(after.get((p["linear"], p["kind"]))),
        ]
        for p in gemm["before"]
    ]
    return ["product", "M x in x out", "TFLOP/s before", "TFLOP/s after"], table


def _layers(row: Row) -> str:
    sizes = row["extrapolated_from"]
    count = f"{row['layers']} layer{'s' if row['layers'] > 1 else ''}"
    return f"{count}, extrapolated from {sizes[0]} and {sizes[1]}" if sizes else count


def _seconds(row: Row, key: str) -> str:
    return show_seconds(row[key]["median"]) if row[key] else MISSING


def _spread(row: Row) -> str:
    seconds = row["step_seconds"]
    if not seconds:
        return MISSING
    low, high = ("low", "high") if row["extrapolated_from"] else ("p10", "p90")
    return f"{show_seconds(seconds[low])} to {show_seconds(seconds[high])}"


def _tera(flops_per_second: float | None) -> str:
    return MISSING if flops_per_second is None else f"{flops_per_second / 1e12:.3g}"


def _percent(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.1f}%"


def _signed(error: float | None) -> str:
    return MISSING if error is None else f"{100 * error:+.1f}%"

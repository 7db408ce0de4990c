# SPDX-License-Identifier: Apache-2.0
"""The tables of a bench, as columns and rows of text: the same on the terminal, in Markdown and in HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_megatron.bench.results import COMPARED_KINDS, Row, layers_text
from lora_megatron.measure.units import MISSING, show_bytes, show_count, show_seconds

Table = tuple[list[str], list[list[str]]]
"""Columns and rows."""


def comparison_table(rows: Sequence[Row], ratios: Sequence[Row]) -> Table:
    """Columns and rows: a column a method, and beside it what it is to the reference."""
    entries = [
        ("step, median", lambda r: _seconds(r, "step_seconds")),
        ("step, p10 to p90 (extrapolated: range)", _spread),
        ("forward and backward", lambda r: _seconds(r, "forward_backward_seconds")),
        ("optimizer", lambda r: _seconds(r, "optimizer_seconds")),
        ("tokens per second and rank", lambda r: show_count(r.get("tokens_per_second_per_rank"))),
        ("model TFLOP/s per rank", lambda r: _tera(r.get("model_flops_per_second_per_rank"))),
        ("hardware TFLOP/s per rank", lambda r: _tera(r.get("hardware_flops_per_second_per_rank"))),
        ("ceiling of matrix products, TFLOP/s", lambda r: _tera(r.get("ceiling_flops_per_second"))),
        ("share of the ceiling", lambda r: _percent(r.get("share_of_ceiling"))),
        ("peak memory of the largest rank", lambda r: show_bytes(r["peak_bytes"])),
        ("the same as planned", lambda r: show_bytes(r["planned_peak_bytes"])),
        ("recomputed", lambda r: r["recompute"]),
        ("trained parameters", lambda r: show_count(r.get("trainable_parameters"))),
    ]
    table = [[label, *(r["out_of_memory"] or show(r) for r in rows)] for label, show in entries]
    for ratio in _of_headline(ratios, rows):
        label = f"{ratio['method']} to {ratio['to']}"
        table.append([f"{label}: speed", *_in_column(rows, ratio, f"{ratio['speed']:.2f}x")])
        table.append([f"{label}: peak memory", *_in_column(rows, ratio, f"{ratio['peak_memory']:.3g}x")])
    return ["", *(f"{row['method']}, {layers_text(row)}" for row in rows)], table


def _of_headline(ratios: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    return [ratio for ratio in ratios if any(row["layers"] == ratio["layers"] for row in rows)]


def _in_column(rows: Sequence[Row], ratio: Row, text: str) -> list[str]:
    return [text if row["method"] == ratio["method"] else "" for row in rows]


def case_table(rows: Sequence[Row]) -> Table:
    """Columns and rows: a row a case, with its speed."""
    columns = ["case", "step", "p10 to p90", "forward, backward", "optimizer", "tokens/s/rank", "model TFLOP/s"]
    columns += ["hardware TFLOP/s", "of ceiling"]
    table = [
        [
            f"{row['method']}, {layers_text(row)}",
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


def memory_table(rows: Sequence[Row]) -> Table:
    """Columns and rows: bytes by kind of each case's largest rank, and how far the plan is off."""
    table = []
    for row in rows:
        if not row["memory_by_rank"]:
            continue
        largest = max(row["memory_by_rank"], key=lambda rank: rank["peak"])
        name = f"{row['method']}, {layers_text(row)}"
        table.append([name, *(show_bytes(largest[kind]) for kind in (*COMPARED_KINDS, "reserved"))])
        errors = row["plan_error"]
        table.append(["  planned / measured", *(_signed(errors[kind]) for kind in COMPARED_KINDS), ""])
    return ["case", "weights", "of them trained", *COMPARED_KINDS[2:], "reserved"], table


def products_table(gemm: Mapping[str, Any]) -> Table:
    """Columns and rows: the rate of each matrix product before and after."""
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


def _seconds(row: Row, key: str) -> str:
    return show_seconds(row[key]["median"]) if row[key] else MISSING


def _spread(row: Row) -> str:
    seconds = row["step_seconds"]
    if not seconds:
        return MISSING
    low, high = ("low", "high") if row["extrapolated_from"] else ("p10", "p90")
    return f"{show_seconds(seconds[low])} to {show_seconds(seconds[high])}"


def _tera(flops_per_second: float | None) -> str:
    """Three digits at least: of FP8 products there are thousands."""
    if flops_per_second is None:
        return MISSING
    tera = flops_per_second / 1e12
    return f"{tera:,.0f}" if tera >= 100 else f"{tera:.3g}"


def _percent(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.1f}%"


def _signed(error: float | None) -> str:
    return MISSING if error is None else f"{100 * error:+.1f}%"

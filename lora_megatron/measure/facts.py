# SPDX-License-Identifier: Apache-2.0
"""What a run comes to, in words: the rows that its report in Markdown and the one in HTML both show."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lora_megatron.measure import markdown
from lora_megatron.measure.units import MISSING, show_bytes, show_count, show_loss, show_seconds

Summary = Mapping[str, Any]
"""See `measure.report`."""
WARM_UP_STEPS = 3
"""The first steps of a process allocate, compile and fill caches: no speed is told from them."""


def steady_spread(seconds: Sequence[float]) -> dict[str, float] | None:
    """Median, p10 and p90 of a process's step times after its warm-up (of all if there are no others)."""
    ordered = sorted(seconds[WARM_UP_STEPS:] or seconds)
    if not ordered:
        return None
    return {
        "median": statistics.median(ordered),
        "p10": ordered[len(ordered) // 10],
        "p90": ordered[min(len(ordered) - 1, len(ordered) * 9 // 10)],
    }


def facts(summary: Summary) -> list[list[str]]:
    """(what, value) rows about one run."""
    loss = summary.get("held_out_loss") or {}
    seconds = summary.get("step_seconds") or {}
    spread = f" (p10 {show_seconds(seconds.get('p10'))}, p90 {show_seconds(seconds.get('p90'))})" if seconds else ""
    best = summary.get("best")
    kept = f"{best['by']} {show_loss(best['value'])} after step {show_count(best['step'])}" if best else None
    return [
        ["layout", f"{markdown.layout_text(summary.get('layout') or {})}; ranks: {summary.get('world_size', MISSING)}"],
        ["device, precision", f"{summary.get('device', MISSING)}, {summary.get('precision', MISSING)}"],
        ["steps", show_count(summary.get("steps"))],
        ["held-out loss before (nats per token)", show_loss(loss.get("before"))],
        ["held-out loss after (nats per token)", show_loss(loss.get("after"))],
        *([["kept in best/", kept]] if kept else []),
        ["trainable parameters", show_count(summary.get("trainable_parameters")) + trained_share(summary)],
        ["checkpoint of the trained parameters", show_bytes(summary.get("checkpoint_bytes"))],
        ["tokens per second, padding included", show_count(summary.get("tokens_per_second"))],
        ["tokens per second and rank, padding included", show_count(summary.get("tokens_per_second_per_rank"))],
        ["step, median", show_seconds(seconds.get("median")) + spread],
        ["peak memory of the largest rank", show_bytes(summary.get("peak_memory_bytes") or None)],
        ["examples cut to fit a row", show_count(summary.get("truncated_rows"))],
        ["wall time", show_seconds(summary.get("wall_seconds"))],
    ]


def trained_share(summary: Summary) -> str:
    """` (1.52% of 135,040)`, or nothing where it is not known."""
    trainable, total = summary.get("trainable_parameters"), summary.get("total_parameters")
    return f" ({100 * trainable / total:.3g}% of {show_count(total)})" if trainable is not None and total else ""


def memory_note(summary: Summary) -> str:
    """What the memory numbers are, in one sentence."""
    if str(summary.get("device", "cpu")) != "cpu":
        return "Peak is the CUDA allocator's; activations are what it holds beyond weights, gradients and optimizer."
    return (
        "Activations are the most that autograd held at one time for the backward pass; peak is the sum of the four. "
        "The interpreter, libraries and temporary tensors come on top."
    )

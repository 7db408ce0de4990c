# SPDX-License-Identifier: Apache-2.0
"""The report of one run: report.json (all numbers), report.md (for people), loss.png.

A summary is what training hands over, plain JSON values; a key that is missing shows as "-":

    method, layout {tensor, pipeline, virtual_pipeline, context, sequence, data}, world_size, device, precision, steps,
    held_out_loss {before, after} and train_curve, held_out_curve [[step, loss], ..] in nats per token,
    trainable_parameters, total_parameters, checkpoint_bytes, peak_memory_bytes (largest rank's), truncated_rows,
    tokens_per_second, tokens_per_second_per_rank, step_seconds {median, p10, p90}, wall_seconds,
    memory_by_rank [{rank, weights, gradients, optimizer, activations, peak}, ..] in bytes,
    samples [{context, reference, before, after}, ..]
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_megatron.measure import markdown
from lora_megatron.measure.atomic import write_json, write_text
from lora_megatron.measure.curves import Curves, draw_losses
from lora_megatron.measure.units import MISSING, show_bytes, show_count, show_loss, show_seconds

Summary = Mapping[str, Any]
PICTURE_NAME = "loss.png"


def write_report(folder: Path, summary: Summary) -> None:
    """Write report.json, report.md and loss.png into `folder`; each appears whole or not at all."""
    curves = Curves(summary.get("train_curve", ()), summary.get("held_out_curve", ()))
    method = str(summary.get("method", "run"))
    draw_losses(folder / PICTURE_NAME, {method: curves}, title=f"{method}: loss over {summary.get('steps')} steps")
    write_text(folder / "report.md", "\n".join(_lines(method, summary)))
    write_json(folder / "report.json", dict(summary))


def _lines(method: str, summary: Summary) -> list[str]:
    lines = [f"# Training report: {markdown.escape(method)}", ""]
    lines += [f"![Training and held-out loss over steps]({PICTURE_NAME})", ""]
    lines += markdown.table(["", "value"], facts(summary), numbers=False)
    lines += ["## Memory per rank", ""]
    lines += markdown.table(["rank", *markdown.MEMORY_KINDS], markdown.memory_rows(summary.get("memory_by_rank", ())))
    lines += [memory_note(summary), ""]
    shown = markdown.samples(
        summary.get("samples", ()),
        {"before": "before training", "after": "after training", "reference": "reference"},
    )
    if shown:
        lines += ["## Generated text", "", *shown]
    return lines


def facts(summary: Summary) -> list[list[str]]:
    """(what, value) rows about one run."""
    loss = summary.get("held_out_loss") or {}
    seconds = summary.get("step_seconds") or {}
    trainable, total = summary.get("trainable_parameters"), summary.get("total_parameters")
    share = f" ({100 * trainable / total:.3g}% of {show_count(total)})" if trainable is not None and total else ""
    spread = f" (p10 {show_seconds(seconds.get('p10'))}, p90 {show_seconds(seconds.get('p90'))})" if seconds else ""
    return [
        ["layout", f"{markdown.layout_text(summary.get('layout') or {})}; ranks: {summary.get('world_size', MISSING)}"],
        ["device, precision", f"{summary.get('device', MISSING)}, {summary.get('precision', MISSING)}"],
        ["steps", show_count(summary.get("steps"))],
        ["held-out loss before (nats per token)", show_loss(loss.get("before"))],
        ["held-out loss after (nats per token)", show_loss(loss.get("after"))],
        ["trainable parameters", show_count(trainable) + share],
        ["checkpoint of the trained parameters", show_bytes(summary.get("checkpoint_bytes"))],
        ["tokens per second, padding included", show_count(summary.get("tokens_per_second"))],
        ["tokens per second and rank, padding included", show_count(summary.get("tokens_per_second_per_rank"))],
        ["step, median", show_seconds(seconds.get("median")) + spread],
        ["peak memory of the largest rank", show_bytes(summary.get("peak_memory_bytes"))],
        ["examples cut to fit a row", show_count(summary.get("truncated_rows"))],
        ["wall time", show_seconds(summary.get("wall_seconds"))],
    ]


def memory_note(summary: Summary) -> str:
    """What the memory numbers are, in one sentence."""
    if "cuda" in str(summary.get("device", "")):
        return "Peak is the CUDA allocator's; activations are what it holds beyond weights, gradients and optimizer."
    return (
        "Activations are the most that autograd held at one time for the backward pass; peak is the sum of the four. "
        "The interpreter, libraries and temporary tensors come on top."
    )

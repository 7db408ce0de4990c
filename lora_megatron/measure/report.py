# SPDX-License-Identifier: Apache-2.0
"""The report of one run: report.json (all numbers), report.md and report.html (for people), loss.png.

A summary is what training hands over, plain JSON values; a key that is missing shows as "-":

    method, layout {tensor, pipeline, virtual_pipeline, context, sequence, data}, world_size, device, precision, steps,
    held_out_loss {before, after} and train_curve, held_out_curve [[step, loss], ..] in nats per token,
    best {by, step, value} (the evaluation whose weights are in best/),
    trainable_parameters, total_parameters, checkpoint_bytes, peak_memory_bytes (largest rank's), truncated_rows,
    tokens_per_second, tokens_per_second_per_rank, step_seconds {median, p10, p90}, wall_seconds,
    memory_by_rank [{rank, weights, gradients, optimizer, activations, peak, trained, reserved}, ..] in bytes,
    samples [{context, reference, before, after}, ..]
"""

from __future__ import annotations

from pathlib import Path

from lora_megatron.measure import markdown
from lora_megatron.measure.atomic import write_json, write_text
from lora_megatron.measure.curves import Curves, draw_losses
from lora_megatron.measure.facts import Summary, facts, memory_note
from lora_megatron.measure.html_report import write_html_report

PICTURE_NAME = "loss.png"


def write_report(folder: Path, summary: Summary) -> None:
    """Write report.json, report.md, loss.png and report.html into `folder`; each appears whole or not at all.

    report.html also shows what the run folder tells beside the summary: logs, configuration, environment.
    """
    curves = Curves(summary.get("train_curve", ()), summary.get("held_out_curve", ()))
    method = str(summary.get("method", "run"))
    draw_losses(folder / PICTURE_NAME, {method: curves}, title=f"{method}: loss over {summary.get('steps')} steps")
    write_text(folder / "report.md", "\n".join(_lines(method, summary)))
    write_json(folder / "report.json", dict(summary))
    write_html_report(folder)


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

# SPDX-License-Identifier: Apache-2.0
"""The report of one run as `report.html`, from its folder alone: also of a run that is going on or ended early."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_megatron.measure import html_page, markdown
from lora_megatron.measure.curves import smooth
from lora_megatron.measure.decimation import XY
from lora_megatron.measure.facts import WARM_UP_STEPS, facts, memory_note, steady_spread, trained_share
from lora_megatron.measure.html_page import Html, Section
from lora_megatron.measure.html_settings import configuration_cards, environment_cards, layout_rows
from lora_megatron.measure.html_stragglers import straggler_blocks
from lora_megatron.measure.memory_bars import memory_bars, memory_table
from lora_megatron.measure.redaction import redact
from lora_megatron.measure.run_record import RunRecord, read_run
from lora_megatron.measure.svg_bars import histogram
from lora_megatron.measure.svg_lines import Series, line_chart
from lora_megatron.measure.units import MISSING, show_bytes, show_count, show_loss, show_seconds

_SAMPLE_TEXTS = {"before": "before training", "after": "after training", "reference": "reference"}
_SMOOTHED_FROM = 30  # steps: a shorter curve has nothing to smooth
_ROWS_IN_SIGHT = 16


def write_html_report(folder: Path) -> Path:
    """Write `report.html` into the run folder `folder` from what is there; the same files give the same bytes."""
    record = read_run(folder)
    summary = record.summary
    sections = [
        Section("Training", _training(record)),
        Section("Speed", _speed(record)),
        Section("Memory", _memory(record)),
        Section("Generated text", html_page.samples(summary.get("samples") or (), _SAMPLE_TEXTS)),
        Section("Facts", [_facts(summary)]),
        Section("Configuration", configuration_cards(record.config)),
        Section("Versions and devices", environment_cards(record.environment)),
    ]
    title = f"Training report: {folder.resolve().name}"
    return html_page.write_html(
        folder, title, sections, subtitle=_subtitle(record), lead=[*_state(record), _tiles(summary)]
    )


def _subtitle(record: RunRecord) -> str:
    summary, method = record.summary, record.config.get("method") or {}
    targets = ", ".join(f"{target} {rank}" for target, rank in (method.get("targets") or {}).items())
    name = str(summary.get("method", "run"))
    layout = markdown.layout_text(summary.get("layout") or {})
    ranks = f"{summary.get('world_size', MISSING)} ranks ({layout})" if layout != "one process" else layout
    words = [f"{name} ({targets})" if name == "lora" and targets else name, ranks]
    return " · ".join(
        str(word) for word in [*words, summary.get("device"), summary.get("precision")] if word not in (None, MISSING)
    )


def _state(record: RunRecord) -> list[Html]:
    """A framed sentence about a run that did not end as it should; nothing about one that did."""
    state, last = record.status.get("state"), show_count(record.summary.get("steps"))
    planned = (record.config.get("train") or {}).get("steps")
    log = f"Its log has {last}{'' if planned is None else f' of {show_count(planned)}'} steps."
    if state == "failed":
        status, error = record.status.get("exit_status", MISSING), redact(str(record.status.get("error", "")))
        return [html_page.paragraph(f"This run failed with exit status {status}: {error}\n{log}", kind="failure")]
    if state == "preempted":
        remedy = "started again with run.resume=auto, it goes on from its newest checkpoint"
        return [html_page.paragraph(f"This run was preempted: {remedy}. {log}", kind="warning")]
    if not record.is_done:
        text = f"This run was going on, or was killed, when this was written. {log}"
        return [html_page.paragraph(text, kind="warning")]
    return []


def _tiles(summary: Any) -> Html:
    loss, seconds = summary.get("held_out_loss") or {}, summary.get("step_seconds") or {}
    values = [
        ("held-out loss, nats/token", show_loss(loss.get("after")), f"first: {show_loss(loss.get('before'))}"),
        ("trainable parameters", show_count(summary.get("trainable_parameters")), trained_share(summary).strip(" ()")),
        ("tokens per second", show_count(summary.get("tokens_per_second")), "padding included"),
        ("step, median", show_seconds(seconds.get("median")), f"p90: {show_seconds(seconds.get('p90'))}"),
        ("peak memory", show_bytes(summary.get("peak_memory_bytes") or None), "of the largest rank"),
        ("steps", show_count(summary.get("steps")), ""),
        ("wall time", show_seconds(summary.get("wall_seconds")), "start-up included"),
    ]
    return html_page.tiles([tile for tile in values if tile[1] != MISSING])


def _training(record: RunRecord) -> list[Html]:
    skipped = [line["step"] for line in record.steps if line.get("skipped") is True]
    rate, norm = record.curve("lr"), record.curve("grad_norm")
    blocks = [
        html_page.side_by_side(
            line_chart("Loss", loss_series(record), y_label="loss", unit="nats per token", may_be_log=True, tall=True),
            line_chart("Learning rate", [Series("learning rate", rate)], y_label="learning rate", from_zero=True),
            line_chart("Gradient norm", noisy("norm", norm), y_label="global norm before clipping", may_be_log=True),
        )
    ]
    if skipped:
        named = ", ".join(map(str, skipped[:20])) + (", …" if len(skipped) > 20 else "")
        blocks.append(html_page.paragraph(f"Steps without an update ({len(skipped):,}): {named}.", kind="warning"))
    if any(y is None for _, y in [*record.loss_curve, *norm]):
        note = "A red band under a cross: no finite value was recorded there, or no line of the log is left."
        blocks.append(html_page.paragraph(note, kind="note"))
    return blocks


def loss_series(record: RunRecord) -> list[Series]:
    """Training loss (thin, and smoothed where there are steps enough); held-out loss and skipped steps as marks."""
    skipped = {line["step"] for line in record.steps if line.get("skipped") is True}
    taken = [(x, y) for x, y in record.loss_curve if y is None or x not in skipped]
    left_out = [(x, y) for x, y in record.loss_curve if y is not None and x in skipped]
    return [
        *noisy("training", taken),
        Series("held-out", record.held_out_curve, style="marks", colour=1),
        Series("update skipped", left_out, style="marks", colour=3),
    ]


def noisy(name: str, points: Sequence[XY], *, colour: int = 0) -> list[Series]:
    """The curve as it is and, if it is long, its smoothed form over it."""
    if len(points) < _SMOOTHED_FROM:
        return [Series(name, points, colour=colour)]
    return [
        Series(name, points, style="thin", colour=colour),
        Series(f"{name}, smoothed", smoothed(points), colour=colour),
    ]


def smoothed(points: Sequence[XY]) -> list[XY]:
    """The mean of the neighbours on both sides; gaps stay gaps."""
    means = iter(smooth([y for _, y in points if y is not None]))
    return [(x, None if y is None else next(means)) for x, y in points]


def _speed(record: RunRecord) -> list[Html]:
    times: list[XY] = record.curve("step_seconds")
    tokens = {line["step"]: line.get("tokens") for line in record.steps}
    rates: list[XY] = [(x, count / y if (count := tokens.get(x)) and y else None) for x, y in times]
    seconds = record.values("step_seconds")
    levels = dict(sorted((steady_spread(seconds) or {}).items(), key=lambda pair: pair[1]))
    charts = [
        line_chart(
            "Tokens per second, all ranks",
            noisy("tokens/s", rates),
            y_label="tokens/s, padding included",
            from_zero=True,
        ),
        histogram("Step time", seconds, x_label="time of a step", y_label="steps", unit="s", levels=levels),
    ]
    note = f"The histogram counts every step; its levels leave out the first {WARM_UP_STEPS}, which fill caches."
    return [html_page.side_by_side(*charts), html_page.paragraph(note, kind="note"), *straggler_blocks(record)]


def _memory(record: RunRecord) -> list[Html]:
    by_rank = record.summary.get("memory_by_rank") or []
    if not by_rank:
        peak = show_bytes(max(record.values("peak_memory_bytes"), default=None))
        return [
            html_page.paragraph(
                f"Memory by kind is gathered from the ranks when a run ends. Peak of rank 0 so far: {peak}."
            )
        ]
    columns, rows = memory_table({"": by_rank})
    table = html_page.table(columns, rows)
    if len(rows) > _ROWS_IN_SIGHT:
        table = html_page.folded(f"{len(rows)} rows of numbers", table)
    chart = memory_bars("Memory by kind and rank", {"": by_rank})
    return [html_page.side_by_side(chart, table), html_page.paragraph(memory_note(record.summary), kind="note")]


def _facts(summary: Any) -> Html:
    return html_page.side_by_side(
        html_page.table(["", ""], facts(summary), numbers=False, caption="The run"),
        html_page.table(["", ""], layout_rows(summary), numbers=False, caption="Layout"),
    )

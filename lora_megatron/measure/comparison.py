# SPDX-License-Identifier: Apache-2.0
"""The report that sets LoRA beside full fine-tuning of the same base on the same data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from lora_megatron.measure import console, markdown
from lora_megatron.measure.atomic import write_json, write_text
from lora_megatron.measure.curves import Curves, draw_losses
from lora_megatron.measure.facts import Summary, memory_note
from lora_megatron.measure.html_comparison import write_html_comparison
from lora_megatron.measure.report import PICTURE_NAME
from lora_megatron.measure.units import show_bytes, show_count, show_loss, show_ratio, show_seconds

COLUMNS = ("", "LoRA", "full fine-tuning", "ratio")
_PLAIN_NUMBERS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("trainable_parameters", "trainable parameters", show_count),
    ("checkpoint_bytes", "checkpoint of the trained parameters", show_bytes),
    ("tokens_per_second", "tokens per second, padding included", show_count),
    ("peak_memory_bytes", "peak memory of the largest rank", show_bytes),
    ("wall_seconds", "wall time, start-up and evaluation included", show_seconds),
)
_LABELS = {"lora": "LoRA", "full": "full fine-tuning"}
_TEXTS = {"before": "base", "after": "LoRA", "full": "full fine-tuning", "reference": "reference"}
_SAMPLES_ON_TERMINAL = 2


def write_comparison(
    folder: Path,
    runs: Mapping[str, Summary],
    *,
    title: str = "LoRA beside full fine-tuning",
    setting: Mapping[str, str] | None = None,
    stream: TextIO | None = None,
) -> None:
    """Write report.json, report.md, report.html and loss.png into `folder`, and the table to the terminal.

    runs: summaries (see `measure.report`) under `lora` and `full`, and optionally `base`, the run both start from.
    setting: what else a reader must know (hardware, commands), as label -> text.
    """
    comparison = compare(runs)
    write_json(folder / "report.json", {**comparison, "setting": dict(setting or {}), "runs": dict(runs)})
    curves = {
        label: Curves(runs[name].get("train_curve", ()), runs[name].get("held_out_curve", ()))
        for name, label in _LABELS.items()
    }
    base_loss = comparison["held_out_loss"]["base"]
    draw_losses(folder / PICTURE_NAME, curves, title=title, base_loss=base_loss, base_label="base, not adapted")
    write_text(folder / "report.md", "\n".join(_lines(title, runs, comparison, setting or {})))
    write_html_comparison(
        folder,
        title,
        columns=COLUMNS,
        rows=table_rows(comparison),
        curves=curves,
        base_loss=base_loss,
        memory={label: runs[name].get("memory_by_rank", ()) for name, label in _LABELS.items()},
        memory_note=memory_note(runs["lora"]),
        samples=_merged_samples(runs),
        texts=_TEXTS,
        setting=_setting_rows(runs, setting or {}),
    )
    print_comparison(runs, comparison, title=title, stream=stream)


def compare(runs: Mapping[str, Summary]) -> dict[str, Any]:
    """The numbers both runs have, each as {lora, full}; `held_out_loss` also has the base's, before any adaptation."""
    lora, full = runs["lora"], runs["full"]
    losses = {name: (runs[name].get("held_out_loss") or {}) for name in ("lora", "full")}
    result: dict[str, Any] = {
        "held_out_loss": {
            "base": losses["lora"].get("before"),
            "lora": losses["lora"].get("after"),
            "full": losses["full"].get("after"),
        }
    }
    # One run may have turned by its last step: the end alone would flatter the other.
    result["lowest_held_out_loss"] = {name: _lowest(runs[name].get("held_out_curve", ())) for name in ("lora", "full")}
    for key, _, _ in _PLAIN_NUMBERS:
        result[key] = {"lora": lora.get(key), "full": full.get(key)}
    result["memory_bytes_by_kind"] = {
        kind: {name: _largest(runs[name], kind) for name in ("lora", "full")} for kind in markdown.MEMORY_KINDS
    }
    return result


def _lowest(curve: Sequence[Sequence[float | None]]) -> float | None:
    """The smallest loss of a [[step, loss], ..] curve."""
    return min((loss for _, loss in curve if loss is not None and math.isfinite(loss)), default=None)


def _largest(summary: Summary, kind: str) -> int | None:
    """Bytes of `kind` on the rank that has most of it."""
    return max((rank[kind] for rank in summary.get("memory_by_rank", ())), default=None)


def table_rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    """Rows under COLUMNS; the ratio is LoRA's number over full fine-tuning's."""
    loss = comparison["held_out_loss"]
    rows = [["held-out loss of the base (nats per token)", show_loss(loss["base"]), show_loss(loss["base"]), ""]]
    entries: list[tuple[str, Mapping[str, Any], Callable[[float | None], str]]] = [
        ("held-out loss after training", loss, show_loss),
        ("held-out loss at its lowest on the way", comparison["lowest_held_out_loss"], show_loss),
    ]
    entries += [(label, comparison[key], show) for key, label, show in _PLAIN_NUMBERS]
    by_kind = comparison["memory_bytes_by_kind"]
    entries += [(f"of it {kind}", by_kind[kind], show_bytes) for kind in markdown.MEMORY_KINDS if kind != "peak"]
    for label, pair, show in entries:
        rows.append([label, show(pair["lora"]), show(pair["full"]), show_ratio(pair["lora"], pair["full"])])
    wall = next(index for index, row in enumerate(rows) if row[0].startswith("wall time"))
    rows.append(rows.pop(wall))  # the kinds of memory stand under its peak
    return rows


def _merged_samples(runs: Mapping[str, Summary]) -> list[dict[str, str | None]]:
    """LoRA's samples, with full fine-tuning's text for the same context beside them."""
    by_context = {sample["context"]: sample.get("after") for sample in runs["full"].get("samples", ())}
    return [{**sample, "full": by_context.get(sample["context"])} for sample in runs["lora"].get("samples", ())]


def _lines(
    title: str, runs: Mapping[str, Summary], comparison: Mapping[str, Any], setting: Mapping[str, str]
) -> list[str]:
    lines = [f"# {markdown.escape(title)}", ""]
    lines += markdown.table(COLUMNS, table_rows(comparison))
    lines += [f"![Loss of both runs over steps]({PICTURE_NAME})", ""]
    lines += ["## Memory per rank", ""]
    rows = [row for name in ("lora", "full") for row in _memory_rows(name, runs[name])]
    lines += markdown.table(["run", "rank", *markdown.MEMORY_KINDS], rows)
    lines += [memory_note(runs["lora"]), ""]
    shown = markdown.samples(_merged_samples(runs), _TEXTS)
    if shown:
        lines += ["## Generated text", "", *shown]
    return [*lines, "## Setting", "", *markdown.table(["", "value"], _setting_rows(runs, setting), numbers=False)]


def _setting_rows(runs: Mapping[str, Summary], setting: Mapping[str, str]) -> list[list[str]]:
    return [
        ["layout", markdown.layout_text(runs["lora"].get("layout") or {})],
        ["device, precision", f"{runs['lora'].get('device')}, {runs['lora'].get('precision')}"],
        *([label, text] for label, text in setting.items()),
    ]


def _memory_rows(name: str, summary: Summary) -> list[list[str]]:
    return markdown.memory_rows(summary.get("memory_by_rank", ()), "LoRA" if name == "lora" else "full")


def print_comparison(
    runs: Mapping[str, Summary], comparison: Mapping[str, Any], *, title: str, stream: TextIO | None = None
) -> None:
    """The table and a few generated sentences on the terminal."""
    console.print_table(title, COLUMNS, table_rows(comparison), stream=stream)
    texts = {"context": "", "before": "base", "after": "LoRA", "full": "full", "reference": "reference"}
    for sample in _merged_samples(runs)[:_SAMPLES_ON_TERMINAL]:
        for key, label in texts.items():
            text = sample.get(key)
            if text is not None:
                shown = markdown.printable(text)
                print(f"  {label:<10} {shown}" if label else f"\n{shown}", file=stream)

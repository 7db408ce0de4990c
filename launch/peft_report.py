# SPDX-License-Identifier: Apache-2.0
"""The report of `bench_peft.py`: every case beside PEFT's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launch.side_by_side import hardware_text, layers_text, notes_lines, spread_text
from lora_megatron.measure.markdown import table
from lora_megatron.measure.units import MISSING, show_bytes, show_count, show_ratio, show_seconds

REFERENCE = "peft"
Row = dict[str, Any]
_COLUMNS = ["case", "step, median", "p10 to p90", "tokens/s", "to PEFT", "peak", "to PEFT", "activations", "to PEFT"]
_RATIOS = {"speed": "tokens_per_second", "peak": "peak_bytes", "activations": "activation_bytes"}


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Each row with `to_peft`: its speed, peak and activations over those of PEFT's row of as many layers."""
    result = []
    for row in rows:
        others = [r for r in rows if r["case"] == REFERENCE and r["layers"] == row["layers"]]
        ratios = {name: _over(row.get(key), others[0].get(key) if others else None) for name, key in _RATIOS.items()}
        result.append({**row, "to_peft": ratios})
    return result


def _over(part: float | None, whole: float | None) -> float | None:
    return part / whole if part and whole else None


def lines_of(report: Mapping[str, Any]) -> list[str]:
    """The report in Markdown."""
    options = report["options"]
    lines = [f"# LoRA at width {options['hidden']}: this project, plain torch layers, PEFT", ""]
    if not report["complete"]:
        lines += ["**Not complete: still running, or ended before its last step.**", ""]
    for layers in dict.fromkeys(row["layers"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["layers"] == layers]
        lines += [f"## {layers_text(layers)}, measured", "", *table(_COLUMNS, [_cells(row) for row in rows])]
    if report["scaled"]:
        lines += [f"## {report['scaled'][0]['layers']} layers, extrapolated from the two slices", ""]
        lines += table(_COLUMNS, [_cells(row) for row in report["scaled"]])
    return lines + notes_lines(
        [
            f"{options['batch']} x {options['sequence']} tokens a step, vocabulary {options['vocabulary']}, LoRA of "
            f"rank {options['rank']}, random weights and tokens, bf16 but for the frozen weights' storage; "
            f"{options['rounds']} visits to each case in turn, of {options['steps']} steps each after a warm-up.",
            "Activations: the most allocated during a step minus what was as it began; on a CPU what autograd kept, "
            "and no peak is known.",
            f"PEFT: transformers' GPT-2 with {options['peft_gelu']}, sdpa attention, adapters in bf16 (by default PEFT "
            "keeps them in fp32 and casts, which is slower).",
            hardware_text(report["environment"]),
            report["command"],
        ]
    )


def _cells(row: Row) -> list[str]:
    seconds = row.get("step_seconds")
    if not seconds:
        return [row["case"], "out of memory" if row["out_of_memory"] else "not yet", *[MISSING] * (len(_COLUMNS) - 2)]
    ratios = {name: show_ratio(value, 1.0) for name, value in row["to_peft"].items()}
    return [
        row["case"],
        show_seconds(seconds["median"]),
        spread_text(seconds) if "p10" in seconds else "extrapolated",
        show_count(row["tokens_per_second"]),
        ratios["speed"],
        show_bytes(row["peak_bytes"]),
        ratios["peak"],
        show_bytes(row["activation_bytes"]),
        ratios["activations"],
    ]

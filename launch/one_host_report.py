# SPDX-License-Identifier: Apache-2.0
"""The report of `launch/one_host.py` in Markdown, from what report.json holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch import side_by_side as side
from lora_megatron.bench.notes import range_text
from lora_megatron.bench.results import layers_text
from lora_megatron.measure.markdown import escape, table
from lora_megatron.measure.units import MISSING, show_bytes, show_count, show_seconds

Facts = Mapping[str, Any]
GIB = 2**30
ROUNDING = 2.0**-8
"""Of bf16, relative: what one operation may be off. Sums over ranks are in another order at another layout."""
DONE, FAILED, SKIPPED, WAITING = "done", "failed", "skipped", "to come"


def whole_row(part: Facts, method: str = "lora") -> Facts | None:
    """Of the most layers, measured or from slices; None where there is none."""
    rows = [row for row in part.get("rows", ()) if row["method"] == method and not row["out_of_memory"]]
    return rows[-1] if rows else None


def values_of(part: Facts, goals: Mapping[str, float]) -> list[dict[str, Any]]:
    """Numbers of a part that have a goal."""
    found = []
    if "speed" in goals and (row := whole_row(part)):
        what = f"{part['what']}: tokens/s per GPU, {layers_text(dict(row))}"
        found.append(_value(what, row["tokens_per_second_per_rank"], goals["speed"]))
    if "ratio" in goals and part.get("ratios"):
        last = part["ratios"][-1]
        scaled = f"slices scaled to {last['layers']} layers" if last["extrapolated"] else f"{last['layers']} layers"
        found.append(_value(f"LoRA over full fine-tuning, {scaled}", last["speed"], goals["ratio"]))
    return found


def _value(what: str, value: float, goal: float) -> dict[str, Any]:
    return {"what": what, "value": value, "goal": goal, "met": value >= goal}


def lines_of(report: Facts) -> list[str]:
    """The whole report."""
    shape, parts = report["shape"], report["parts"]
    name = (
        f"{shape['num_layers']} layers of width {shape['hidden_size']} on {report['processes']} processes of one host"
    )
    lines = [f"# {name}", ""]
    if not report["complete"]:
        lines += ["**Not complete: still running, or ended before its last part.**", ""]
    lines += [f"{_hardware(report['environment'])}.", "", "## Speed and memory of each layout", ""]
    lines += _speeds(parts)
    lines += ["## Goals", "", *_goals(report)]
    lines += ["## Communication by kind, share of a step's time", "", *_communication(parts)]
    lines += ["## Full fine-tuning: slices, and what they say of the whole", "", *_slices(parts)]
    lines += ["## The adapter at another layout; a run stopped and resumed", "", *_proofs(parts)]
    lines += ["## Memory of every rank, measured / planned", "", *_memory(parts)]
    lines += ["## Time of each part", "", *_times(parts)]
    return [*lines, "## Setting", "", *_setting(report)]


def _hardware(environment: Facts) -> str:
    """`8 x NVIDIA H200, Python ...`: GPUs of one name once."""
    gpus = Counter(gpu["name"] for gpu in environment["devices"].get("gpus", ()))
    names = [{"name": f"{count} x {name}"} for name, count in gpus.items()]
    return side.hardware_text({**environment, "devices": {**environment["devices"], "gpus": names}})


def _speeds(parts: Sequence[Facts]) -> list[str]:
    rows = []
    for part in parts:
        if part.get("goals") is None:
            continue
        row = whole_row(part)
        if row is None:
            rows.append([part["what"], part["why"] or part["state"], *[MISSING] * 8])
            continue
        seconds, batch = row["step_seconds"], part["data"]
        low, high = ("low", "high") if row["extrapolated_from"] else ("p10", "p90")
        shares = row.get("communication") or ()
        rows.append(
            [
                part["what"],
                layers_text(dict(row)),
                f"{batch['micro_batch_size']} / {batch['global_batch_size']}",
                show_count(row["tokens_per_second_per_rank"]),
                show_seconds(seconds["median"]),
                f"{show_seconds(seconds[low])} to {show_seconds(seconds[high])}",
                show_bytes(row["peak_bytes"]),
                show_bytes(row["planned_peak_bytes"]),
                range_text([each["share"] for each in shares]) if shares else "not measured",
                range_text([each["exposed_share"] for each in shares]) if shares else "not measured",
            ]
        )
    columns = ["layout", "LoRA on", "micro / global batch", "tokens/s per GPU", "step, median", "p10 to p90"]
    return table([*columns, "peak, largest rank", "planned", "communication", "of it exposed"], rows)


def _goals(report: Facts) -> list[str]:
    rows = []
    for part in report["parts"]:
        if not part.get("goals"):
            continue
        for value in part["values"]:
            verdict = ("met" if value["met"] else "missed") if report["is_the_goals_setting"] else "another setting"
            rows.append([value["what"], f"{value['value']:,.4g}", f">= {value['goal']:,g}", verdict])
        if not part["values"]:
            rows.append([part["what"], MISSING, "", f"not measured: {part['why'] or part['state']}"])
    return table(["what", "value", "goal, of GPT-3 175B on eight GPUs", ""], rows)


def _communication(parts: Sequence[Facts]) -> list[str]:
    rows = []
    for part in parts:
        shares = (whole_row(part) or {}).get("communication") or ()
        for kind in sorted({kind for each in shares for kind in each["by_collective"]}):
            found = [each["by_collective"].get(kind, 0.0) for each in shares]
            rows.append([f"{part['what']}: {kind}", range_text(found)])
        if shares:
            rows.append([f"{part['what']}: nothing ran", range_text([each["idle_share"] for each in shares])])
    if not rows:
        return ["Not measured: no profiler saw a GPU's kernels.", ""]
    return table(["layout: what", "lowest to highest rank"], rows)


def _slices(parts: Sequence[Facts]) -> list[str]:
    found = [part for part in parts if part.get("ratios")]
    rows = [
        [
            f"{row['method']}, {layers_text(row)}",
            show_count(row["tokens_per_second_per_rank"]),
            show_seconds(row["step_seconds"]["median"]),
            show_bytes(row["peak_bytes"]),
        ]
        for part in found
        for row in part["rows"]
        if not row["out_of_memory"]
    ]
    ratios = [
        f"{ratio['layers']} layers{', extrapolated' if ratio['extrapolated'] else ''}: {ratio['speed']:.3f}x"
        for part in found
        for ratio in part["ratios"]
    ]
    if not found:
        return ["Not measured.", ""]
    lines = table(["method, layers (from slices)", "tokens/s per GPU", "step, median", "peak, largest rank"], rows)
    return [*lines, f"LoRA over full fine-tuning, neither recomputed, same batches: {'; '.join(ratios)}.", ""]


def _proofs(parts: Sequence[Facts]) -> list[str]:
    lines = []
    for part in parts:
        if part["part"] not in ("adapter", "resume"):
            continue
        facts = part.get("facts")
        text = _adapter_text(facts) if facts and part["part"] == "adapter" else _resume_text(facts) if facts else ""
        verdict = "holds" if facts and facts["holds"] else "DOES NOT HOLD" if facts else part["why"] or part["state"]
        lines.append(f"- **{escape(part['what'])}**: {escape(f'{verdict}. {text}'.strip())}")
    return [*lines, ""]


def _adapter_text(facts: Facts) -> str:
    return (
        f"{facts['layers']} layers, random base equal under every layout. {show_bytes(facts['bytes'])} written at "
        f"{facts['layout']}; held-out loss {facts['loss']:.8f} there ({facts['loss_without']:.4f} without adapter), "
        f"{facts['loss_again']:.8f} at {facts['other_layout']}: relative difference {facts['difference']:.1e}, where "
        f"one rounding of bf16 is {ROUNDING:.1e} and the adapter changed {facts['change']:.1e}. The other layout wrote "
        f"{_same(facts)}."
    )


def _resume_text(facts: Facts) -> str:
    steps = ", ".join(map(str, facts["resumed_at"]))
    return (
        f"{facts['layers']} layers, stopped by SIGTERM (status 75) and resumed at step {steps}: "
        f"{facts['equal_steps']} of {facts['steps']} losses equal to the bit, largest relative difference "
        f"{facts['difference']:.1e}; the final adapter is {_same(facts)}."
    )


def _same(facts: Facts) -> str:
    return "the same bytes" if facts["same_bytes"] else "other bytes"


def _memory(parts: Sequence[Facts]) -> list[str]:
    rows = []
    for part in parts:
        for row in part.get("rows", ()):
            for measured, planned in zip(row["memory_by_rank"] or (), row["planned_by_rank"], strict=False):
                pairs = [
                    f"{_gib(measured[kind])} / {_gib(planned[kind])}" for kind in ("weights", "activations", "peak")
                ]
                name = f"{part['what']}: {row['method']}, {layers_text(row)}"
                rows.append([name, str(measured["rank"]), *pairs, _gib(measured["reserved"])])
    columns = ["layout", "rank", "weights, GiB", "activations", "peak", "reserved by the allocator"]
    return table(columns, rows) if rows else ["Not measured.", ""]


def _gib(value: float) -> str:
    return f"{value / GIB:.3g}"


def _times(parts: Sequence[Facts]) -> list[str]:
    rows = [
        [
            part["what"],
            f"{part['planned_seconds']:.0f} s",
            MISSING if part["seconds"] is None else f"{part['seconds']:.0f} s",
            f"{part['state']}{': ' if part['why'] else ''}{part['why']}",
        ]
        for part in parts
    ]
    return table(["part", "planned", "took", ""], rows)


def _setting(report: Facts) -> list[str]:
    commands = [f"{part['part']}: {part['command']}" for part in report["parts"]]
    return [*side.notes_lines(list(_setting_notes(report))), "```", *commands, "```", ""]


def _setting_notes(report: Facts) -> Iterator[str]:
    yield f"{report['command']} (each part is a command of its own, below; torchrun starts it on all ranks)"
    yield f"Environment: {', '.join(f'{key}={value}' for key, value in report['variables'].items()) or 'nothing set'}."
    git = report["environment"]["git"] or {}
    yield f"Commit {git.get('commit') or MISSING}{' with changes' if git.get('dirty') else ''}."
    yield (
        "Tokens are random, and so are weights, drawn on each rank. A step is the one that train runs; of each step "
        "the slowest rank's time counts. The micro-batch is the largest power of two that the planner fits, up to a "
        "limit."
    )
    yield (
        "Communication: time in which kernels of NCCL, copies between GPUs and barriers ran, over the time of the "
        "profiled step that follows the measured ones; exposed: nothing else ran beside them. Waiting for other ranks "
        "counts, such as a pipeline's bubble."
    )
    yield "Planned peaks are those of lora-megatron plan without CUDA's context."

# SPDX-License-Identifier: Apache-2.0
"""The tables of the E2E experiment's report, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launch import side_by_side as side
from launch.e2e_plan import BASE, METHODS
from lora_megatron.measure.markdown import escape, table
from lora_megatron.measure.units import MISSING, show_bytes, show_count, show_loss, show_seconds
from lora_megatron.metrics.tasks import TASKS

METRICS = TASKS["e2e"].metrics
NAME_COPIED = "name_copied"
LABELS = {"bleu": "BLEU", "nist": "NIST", "meteor": "METEOR", "rouge_l": "ROUGE-L", "cider": "CIDEr"}
LABELS |= {NAME_COPIED: "name copied, %"}


def value_of(run: Mapping[str, Any], metric: str) -> float | None:
    """A metric of a run's test, if it is there."""
    test = run["test"]
    found: float | None = test.get(NAME_COPIED) if metric == NAME_COPIED else test.get("scores", {}).get(metric)
    return found


def score_table(runs: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    """Both methods and the base, side by side."""
    rows = [
        [label, *(_mean(summary[method].get(metric)) for method in METHODS), _number(value_of(runs[BASE], metric))]
        for metric, label in LABELS.items()
    ]
    instances = {run["test"]["instances"] for name, run in runs.items() if name != BASE and run["test"]}
    counts = [summary[method]["runs"] for method in METHODS]
    heads = ["", f"LoRA ({counts[0]} seeds)", f"full fine-tuning ({counts[1]} seeds)"]
    heads.append(f"base alone ({show_count(runs[BASE]['test'].get('instances'))} instances)")
    shown = " or ".join(f"{count:,}" for count in sorted(instances))
    text = f"Mean and standard deviation over seeds, on {shown} instances of E2E's test set. {_decoding(runs)}"
    return [text if instances else "No adaptation is evaluated yet.", "", *table(heads, rows), *_unavailable(runs)]


def _decoding(runs: Mapping[str, Any]) -> str:
    """How the answers were searched for, as the evaluations wrote it down."""
    found = [run["test"]["evaluation"] for run in runs.values() if run["test"]]
    if not found:
        return ""
    names = ("beams", "length_penalty", "no_repeat_ngram", "max_new_tokens")
    return "Decoded with " + ", ".join(f"{escape(name)} {found[0][name]}" for name in names if name in found[0]) + "."


def _unavailable(runs: Mapping[str, Any]) -> list[str]:
    reasons = {name: reason for run in runs.values() for name, reason in run["test"].get("unavailable", {}).items()}
    notes = [f"{LABELS[name]} is not available: {reason}" for name, reason in reasons.items()]
    return side.notes_lines(notes) if notes else []


def _mean(found: Mapping[str, Any] | None) -> str:
    if not found:
        return MISSING
    deviation = found["standard_deviation"]
    return f"{found['mean']:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def run_table(runs: Mapping[str, Any]) -> list[str]:
    """The scores of each run, with the interval over instances of its BLEU."""
    rows = []
    for name, run in runs.items():
        edges = run["test"].get("intervals", {}).get("bleu")
        interval = MISSING if not edges else f"{edges[0]:.2f} to {edges[1]:.2f}"
        rows.append([name, *(_number(value_of(run, metric)) for metric in LABELS), interval])
    return ["## Each run", "", *table(["run", *LABELS.values(), "BLEU, 95% interval"], rows)]


def training_table(runs: Mapping[str, Any]) -> list[str]:
    """What each training took and came to."""
    heads = ["run", "trained parameters", "kept for the task", "steps", "held-out loss before", "lowest (step)", "last"]
    heads += ["median step", "whole training", "peak memory"]
    text = (
        "The lowest is what was evaluated. Held-out losses are nats per token without label smoothing: of all tokens "
        "of the corpus' held-out texts for the base, of the targets of E2E's validation part for the adaptations."
    )
    return ["## Training", "", text, "", *table(heads, [_trained(name, run["training"]) for name, run in runs.items()])]


def _trained(name: str, found: Mapping[str, Any]) -> list[str]:
    best, loss, step = (found.get(key) or {} for key in ("best", "held_out_loss", "step_seconds"))
    return [
        name,
        show_count(found.get("trainable_parameters")),
        show_bytes(found.get("checkpoint_bytes")),
        show_count(found.get("steps")),
        show_loss(loss.get("before")),
        f"{show_loss(best.get('value'))} ({show_count(best.get('step'))})",
        show_loss(loss.get("after")),
        show_seconds(step.get("median")),
        show_seconds(found.get("wall_seconds")),
        show_bytes(found.get("peak_memory_bytes")),
    ]


def timeline_table(timeline: Mapping[str, Any]) -> list[str]:
    """When each stage ran."""
    if not timeline:
        return []
    rows = [
        [name, str(stage["start"]), f"{stage['began']:.0f} s", f"{stage['seconds']:.0f} s"]
        for name, stage in sorted(timeline["stages"].items(), key=lambda item: (item[1]["start"], item[1]["began"]))
    ]
    times = ", ".join(show_seconds(seconds) for seconds in timeline["wall_seconds"])
    text = f"Wall time of each start of the experiment: {times}."
    return [text, "", *table(["stage", "start", "began at", "took"], rows)]


def example_lines(examples: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the runs answered, below a reference."""
    lines = ["## Examples", ""] if examples else []
    for example in examples:
        lines.append(f"- **{escape(example['context'])}**")
        lines.append(f"  - one of {example['references']} references: {escape(example['reference'])}")
        lines += [f"  - {name}: {escape(text)}" for name, text in example["answers"].items()]
    return [*lines, ""] if examples else []

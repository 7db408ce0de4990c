# SPDX-License-Identifier: Apache-2.0
"""The report of `launch/e2e_experiment.py`, from whatever of it is finished."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from launch import side_by_side as side
from launch.e2e_plan import BASE, METHODS, Settings, evaluation, evaluation_folder, training
from launch.e2e_tables import (
    METRICS,
    NAME_COPIED,
    example_lines,
    run_table,
    score_table,
    timeline_table,
    training_table,
    value_of,
)
from lora_megatron.data.parquet import open_examples
from lora_megatron.errors import CheckpointError
from lora_megatron.evaluation.rows import Instance, instances_of
from lora_megatron.measure.markdown import escape
from lora_megatron.measure.units import MISSING
from lora_megatron.strict_json import load_json_object

KIND = "e2e experiment"
EXAMPLES = 5
_OF_TRAINING = (
    "steps",
    "held_out_loss",
    "held_out_curve",
    "best",
    "trainable_parameters",
    "total_parameters",
    "checkpoint_bytes",
    "step_seconds",
    "wall_seconds",
    "peak_memory_bytes",
    "tokens_per_second",
    "device",
)
NOTES = (
    "The base is small and has seen a few hundred thousand tokens, many times over: these scores are no measure of "
    "GPT-2, which the paper adapts. They compare two ways of adapting one weak base.",
    "The adaptations train on E2E's development set, since its training set is not among the data: a tenth of the "
    "paper's rows. A part of it, held out by meaning representation, chose the epoch; the test set chose nothing.",
    "Learning rates were set beforehand and not searched for, neither LoRA's nor full fine-tuning's: another pair may "
    "order the methods otherwise. LoRA's is not the paper's 2e-4, because a weak base has more to learn.",
    "The base has read the sentences of E2E's training part, without what they express. From a base that had not, "
    "both would have more to learn.",
    "So few runs make their standard deviation rough, and all start from the same base: what another base would "
    "change is not in it.",
    "The base alone is scored on fewer instances, and NIST and CIDEr depend on the whole set: compare them with care.",
    "Times are of processes that shared the GPU, and say nothing about a method's speed alone. Peak memory is each "
    "process's own, of its training. Of a training that was stopped and went on, both are the last part's.",
    "A name counts as copied where the answer has the restaurant's name literally, capitals aside.",
)


def write_findings(settings: Settings, *, command: str, commands: Sequence[str] | None = None) -> list[str]:
    """Write report.json and report.md; returns the names of the runs that are missing.

    commands: what ran, where that was not in this folder.

    Raises CheckpointError for a file of a stage that is damaged.
    """
    runs = {name: _run(name, settings) for name in (BASE, *settings.adaptations)}
    missing = [name for name, run in runs.items() if not run["training"] or not run["test"]]
    report = {
        "kind": KIND,
        "command": command,
        "commands": _commands(settings) if commands is None else list(commands),
        "settings": settings.identity(),
        "jobs": settings.jobs,
        "seeds": list(settings.seeds),
        "missing": missing,
        "environment": _object(settings.out / BASE / "environment.json"),
        "metric_packages": {name: metadata.version(name) for name in ("sacrebleu", "rouge-score")},
        "data": _object(settings.out / "prepared.json"),
        "timeline": _object(settings.out / "timeline.json"),
        "summary": {method: _summary(runs, method) for method in METHODS},
        "runs": runs,
        "examples": _examples(settings, runs),
        "notes": list(NOTES),
    }
    side.write_report(settings.out, report, _lines(report))
    return missing


def _object(path: Path) -> dict[str, Any]:
    return load_json_object(path, "a part of the report", CheckpointError) if path.exists() else {}


def _run(name: str, settings: Settings) -> dict[str, Any]:
    summary = _object(settings.out / name / "report.json")
    test = _object(evaluation_folder(name, settings) / "scores.json")
    if test:
        test[NAME_COPIED] = _names_copied(_predictions(name, settings))
    return {"training": {key: summary.get(key) for key in _OF_TRAINING} if summary else {}, "test": test}


def _predictions(name: str, settings: Settings) -> list[tuple[Instance, str]]:
    """(instance, answer) of a finished evaluation."""
    path = evaluation_folder(name, settings) / "predictions.jsonl"
    answers = [json.loads(line)["prediction"] for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    rows = open_examples(settings.out / "data" / "e2e" / "test.parquet", with_references=True)
    return list(zip(instances_of(rows, group=True, limit=len(answers)), answers, strict=True))


def _names_copied(pairs: Sequence[tuple[Instance, str]]) -> float | None:
    """Percentage of the instances with a restaurant's name whose answer has it."""
    names = [(_slot(instance.context, "name"), answer) for instance, answer in pairs]
    found = [name.lower() in answer.lower() for name, answer in names if name]
    return 100 * sum(found) / len(found) if found else None


def _slot(context: str, slot: str) -> str | None:
    pairs = (part.split(" : ", 1) for part in context.split(" | "))
    return next((pair[1] for pair in pairs if len(pair) == 2 and pair[0] == slot), None)


def _summary(runs: Mapping[str, Any], method: str) -> dict[str, Any]:
    """metric -> mean and standard deviation (n - 1) over the seeds that are finished."""
    mine = [run for name, run in runs.items() if name.startswith(f"{method}-seed") and run["test"]]
    found: dict[str, Any] = {"runs": len(mine)}
    for metric in (*METRICS, NAME_COPIED):
        values = [value for run in mine if (value := value_of(run, metric)) is not None]
        if values:
            deviation = statistics.stdev(values) if len(values) > 1 else None
            found[metric] = {"mean": statistics.mean(values), "standard_deviation": deviation}
    return found


def _examples(settings: Settings, runs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Some test instances with a reference, and what the base and the first run of each method answered."""
    first = {name.partition("-")[0]: name for name in reversed(list(runs)) if runs[name]["test"]}
    answers = {first[kind]: _predictions(first[kind], settings) for kind in (BASE, *METHODS) if kind in first}
    if not answers:
        return []
    pairs = min(answers.values(), key=len)  # the base has fewer
    rows = dict.fromkeys(len(pairs) * number // EXAMPLES for number in range(EXAMPLES))
    return [
        {
            "context": pairs[row][0].context,
            "reference": pairs[row][0].references[0],
            "references": len(pairs[row][0].references),
            "answers": {name: found[row][1] for name, found in answers.items()},
        }
        for row in rows
    ]


def _commands(settings: Settings) -> list[str]:
    """The commands of the base and of the first run of each method."""
    names = (BASE, *settings.adaptations[: len(METHODS)])
    found = [command for name in names for command in (training(name, settings), evaluation(name, settings))]
    return [shlex.join(["python", *command[1:]]) for command in found]


def _lines(report: Mapping[str, Any]) -> list[str]:
    runs, environment, missing, settings = (report[key] for key in ("runs", "environment", "missing", "settings"))
    lines = ["# LoRA beside full fine-tuning on E2E, from one small base", ""]
    if cut := {name: settings[name] for name in ("rows", "limit", "shrink") if settings[name]}:
        lines += [f"**A rehearsal, cut down: {escape(json.dumps(cut))}. Its numbers say nothing.**", ""]
    if missing:
        lines += [f"**Missing: {escape(', '.join(missing))}.** The tables are of the rest.", ""]
    return [
        *lines,
        *score_table(runs, report["summary"]),
        *run_table(runs),
        *training_table(runs),
        "## What these numbers do not say",
        "",
        *side.notes_lines(NOTES),
        *example_lines(report["examples"]),
        "## How they came about",
        "",
        *side.notes_lines(_facts(report)),
        "Hardware and versions: " + (escape(side.hardware_text(environment)) if environment else MISSING),
        "",
        *timeline_table(report["timeline"]),
        "```",
        report["command"],
        "",
        *report["commands"],
        "```",
    ]


def _facts(report: Mapping[str, Any]) -> list[str]:
    data, settings = report["data"], report["settings"]
    facts = [
        f"learning rates: LoRA {settings['lora_lr']:g}, full fine-tuning {settings['full_lr']:g}; all else of the "
        "adaptations is alike, and in configs/ beside this report",
        f"{report['jobs']} processes at a time; packages of the metrics: "
        + ", ".join(f"{name} {version}" for name, version in report["metric_packages"].items()),
    ]
    if not data:
        return facts
    pairs, meanings, texts = (data[key] for key in ("e2e_pairs", "e2e_meaning_representations", "corpus_texts"))
    return [
        "E2E: " + ", ".join(f"{name} {pairs[name]:,} pairs of {meanings[name]:,} meanings" for name in pairs),
        f"pretraining: {texts['train']:,} texts, and {texts['validation']:,} held out; "
        f"{data['left_out_of_webnlg_and_dart']:,} sentences of WebNLG and DART were left out, as they are E2E's or "
        "there already",
        *facts,
    ]

# SPDX-License-Identifier: Apache-2.0
"""`lora-megatron score`: plain text files of predictions and references to the metrics of a task.

predictions   a line each; an empty line is an empty prediction
references    a line each, those of one instance on consecutive lines; blank lines separate instances
"""

from __future__ import annotations

import json
from pathlib import Path

from lora_megatron.errors import ConfigError, DataError
from lora_megatron.measure.console import print_table
from lora_megatron.metrics.tasks import TASKS, Scores, check_labels, score

MAX_FILE_BYTES = 2**30


def run_score(
    task: str,
    predictions: Path,
    references: Path,
    *,
    metas: Path | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    as_json: bool = False,
) -> None:
    """Print the scores of a file of predictions, as a table or as one JSON object.

    Raises ConfigError for an unknown task or a negative number, DataError for files that cannot be read, are no UTF-8,
    empty, or do not fit each other.
    """
    if task not in TASKS:
        raise ConfigError(f"--task {task!r} is unknown; use one of {', '.join(TASKS)}")
    texts, groups = _lines(predictions), _groups(_lines(references))
    if not texts:
        raise DataError(f"{predictions} is empty: give a prediction a line")
    if not groups:
        raise DataError(f"{references} holds no reference: give one a line, and a blank line between instances")
    if len(texts) != len(groups):
        raise DataError(
            f"{predictions} has {len(texts)} predictions (lines), {references} has {len(groups)} instances (groups of "
            "lines, blank lines between them): they must be as many"
        )
    records = None if metas is None else [line for line in _lines(metas) if line.strip()]
    if records is not None and len(records) != len(texts):
        raise DataError(f"{metas} has {len(records)} lines for {len(texts)} predictions: they must be as many")
    check_labels(task, groups)
    scores = score(task, texts, groups, metas=records, bootstrap=bootstrap, seed=seed)
    if as_json:
        print(json.dumps({**scores.to_dict(), "task": task}, indent=2))
    else:
        print_scores(task, scores)


def print_scores(task: str, scores: Scores) -> None:
    """A table of the metrics with their intervals; those that are not there follow, with the reason."""
    rows = [
        (name, f"{scores.values[name]:.2f}", _shown(scores.intervals.get(name)))
        if name in scores.values
        else (name, "not available", "")
        for name in TASKS[task].metrics
    ]
    print_table(f"{task}: {scores.instances} instances", ("metric", "score", "95% interval"), rows)
    for name, reason in scores.unavailable.items():
        print(f"{name} is not available: {reason}")


def _shown(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"


def _lines(path: Path) -> list[str]:
    """The lines of a text file, which end with \\n or \\r\\n; the last may end without."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{path} is larger than {MAX_FILE_BYTES} bytes; is it the right file?")
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    lines = []
    for number, raw in enumerate(content.removesuffix(b"\n").split(b"\n") if content else (), start=1):
        try:
            lines.append(raw.removesuffix(b"\r").decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    return lines


def _groups(lines: list[str]) -> list[list[str]]:
    """Neighbouring lines that are not blank."""
    groups: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            groups[-1].append(line)
        elif groups[-1]:
            groups.append([])
    return groups if groups[-1] else groups[:-1]

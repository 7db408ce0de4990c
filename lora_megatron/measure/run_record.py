# SPDX-License-Identifier: Apache-2.0
"""What a run's folder tells about it, whether the run is done, going on, or ended early: every file may be missing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from lora_megatron.measure.decimation import XY, finite
from lora_megatron.measure.facts import steady_spread
from lora_megatron.measure.metrics import EVALUATIONS_NAME, METRICS_NAME, read_metrics

STRAGGLERS_NAME = "stragglers.jsonl"
Line = Mapping[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """steps, evaluations and stragglers: the lines of the logs, one a step, in the order of steps."""

    folder: Path
    summary: Mapping[str, Any]
    """See `measure.report`; of a run without a report, what its other files tell."""
    is_done: bool
    """The summary is that of the last step in the log."""
    status: Line
    config: Line
    environment: Line
    steps: list[Line]
    evaluations: list[Line]
    stragglers: list[Line]

    def curve(self, key: str) -> list[XY]:
        """(step, value) of each line; None for a value that is missing or not finite, and for a hole in the steps."""
        return _points(self.steps, key, every_step=True)

    @cached_property
    def loss_curve(self) -> list[XY]:
        """(step, training loss); without a log, that of the summary."""
        if self.steps:
            return self.curve("loss")
        return [(step, finite(loss)) for step, loss in self.summary.get("train_curve") or ()]

    @cached_property
    def held_out_curve(self) -> list[XY]:
        """(step, held-out loss); without a log, that of the summary."""
        if self.evaluations:
            return _points(self.evaluations, "held_out_loss", every_step=False)
        return [(step, finite(loss)) for step, loss in self.summary.get("held_out_curve") or ()]

    def values(self, key: str) -> list[float]:
        """The finite values of `key` over all steps."""
        return [value for line in self.steps if (value := finite(line.get(key))) is not None]


def read_run(folder: Path) -> RunRecord:
    """Read what there is. Raises OSError where a file is there and cannot be read."""
    steps = _lines(folder / METRICS_NAME)
    config = _tree(folder / "config.yaml")
    environment = _tree(folder / "environment.json")
    summary = _tree(folder / "report.json")
    status = _tree(folder / "status.json")
    # A run that was finished, then continued and stopped, still holds the report of its first end.
    is_done = bool(summary) and (not steps or summary.get("steps") == steps[-1]["step"])
    evaluations = _lines(folder / EVALUATIONS_NAME)
    return RunRecord(
        folder=folder,
        summary=summary if is_done else _what_is_known(config, environment, steps, evaluations),
        is_done=is_done,
        status=status,
        config=config,
        environment=environment,
        steps=steps,
        evaluations=evaluations,
        stragglers=[line for line in _lines(folder / STRAGGLERS_NAME) if isinstance(line.get("busy_seconds"), list)],
    )


def _what_is_known(config: Line, environment: Line, steps: list[Line], evaluations: list[Line]) -> dict[str, Any]:
    """The part of a summary that can be told from the logs."""
    parallel = {key: value for key, value in _section(config, "parallel").items() if key != "timeout_minutes"}
    ranks = environment.get("world_size")
    size = 1
    for axis in ("tensor", "pipeline", "context"):
        size *= parallel.get(axis, 1)
    if isinstance(ranks, int):
        parallel["data"] = ranks // size
    seconds = steady_spread([value for line in steps if (value := finite(line.get("step_seconds"))) is not None])
    tokens = finite(steps[-1].get("tokens")) if steps else None
    rate = tokens / seconds["median"] if tokens and seconds and seconds["median"] else None
    losses = [(line["step"], finite(line.get("held_out_loss"))) for line in evaluations]
    return {
        "method": _section(config, "method").get("name", "run"),
        "layout": parallel,
        "world_size": ranks if ranks is not None else "-",
        "device": _device(environment),
        "precision": _section(config, "train").get("precision", "-"),
        "steps": steps[-1]["step"] if steps else 0,
        "held_out_loss": {
            "before": losses[0][1] if losses and losses[0][0] == 0 else None,
            "after": losses[-1][1] if losses else None,
        },
        "tokens_per_second": rate,
        "tokens_per_second_per_rank": rate / ranks if rate and isinstance(ranks, int) else None,
        "step_seconds": seconds,
    }


def _device(environment: Line) -> str:
    devices = _section(environment, "devices")
    gpus = devices.get("gpus") or []
    return str(gpus[0]["name"]) if gpus else str(devices.get("type", "-"))


def _section(tree: Line, name: str) -> dict[str, Any]:
    value = tree.get(name)
    return value if isinstance(value, dict) else {}


def _points(lines: list[Line], key: str, *, every_step: bool) -> list[XY]:
    points: list[XY] = []
    for line in lines:
        step = line["step"]
        if every_step and points and step > points[-1][0] + 1:
            points += [(hole, None) for hole in sorted({points[-1][0] + 1, step - 1})]
        points.append((step, finite(line.get(key))))
    return points


def _lines(path: Path) -> list[Line]:
    """Sorted by step; where a run went back and took a step again, the later line counts."""
    if not path.exists():
        return []
    by_step = {line["step"]: line for line in read_metrics(path)}
    return [by_step[step] for step in sorted(by_step)]


def _tree(path: Path) -> dict[str, Any]:
    """The JSON object or YAML mapping in `path`; empty if it is missing or torn."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        value = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (FileNotFoundError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}

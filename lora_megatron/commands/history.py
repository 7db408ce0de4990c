# SPDX-License-Identifier: Apache-2.0
"""What a run that goes on from a checkpoint takes from its own logs, and how it goes there.

A checkpoint is the state of the model. What else decides the course (the losses that a spike is measured against, how
many bad steps there were, which held-out losses are known) stands in the logs, as far as they reach back before it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_megatron.checkpoint.state import Progress, load_checkpoint, newest_good
from lora_megatron.errors import ConfigError, NumericalError
from lora_megatron.measure.atomic import write_text
from lora_megatron.measure.metrics import EVALUATIONS_NAME, METRICS_NAME, read_metrics
from lora_megatron.measure.run_record import STRAGGLERS_NAME
from lora_megatron.model.names import named_parameters
from lora_megatron.parallel.agree import gather_text, is_main, together
from lora_megatron.training.bad_steps import ROLLBACK, SKIP, BadSteps
from lora_megatron.training.loop import Trainer
from lora_megatron.training.verdict import WINDOW

BAD_STEPS_NAME = "bad_steps.jsonl"


def resume(trainer: Trainer, folder: Path, progress: Progress) -> None:
    """Load a checkpoint that `read_progress` has checked, into a new model or one that was trained; collective.

    Raises:
        ConfigError: it is beyond the last step.
        CheckpointError: a tensor is missing or of another shape.
    """
    if progress.step > trainer.steps:
        epochs = trainer.config.train.epochs
        asked = (
            f"train.steps = {trainer.steps}" if epochs is None else f"train.epochs = {epochs:g} ({trainer.steps} steps)"
        )
        raise ConfigError(f"{asked}, and {folder} is at step {progress.step} already: raise {asked.partition(' ')[0]}")
    named = list(named_parameters([chunk.module for chunk in trainer.chunks]))
    optimizer = trainer.optimizer
    together(
        lambda: load_checkpoint(
            folder, named, lambda names, read: optimizer.load_named_state(names, read, progress.step)
        )
    )
    trainer.step = trainer.saved_step = progress.step
    trainer.consumed_samples = progress.consumed_samples


def known_good_before(
    run: Path, step: int, identity: dict[str, Any], say: Callable[[str], None]
) -> tuple[Path, Progress]:
    """The newest undamaged checkpoint of an earlier step; that of `step` itself may be what gives NaN; collective.

    Raises:
        NumericalError: there is none.
        CheckpointError: there are some and all are damaged.
    """
    if found := newest_good(run, identity, say, before=step):
        return found
    raise NumericalError(
        f"a bad step after step {step}, and no checkpoint is known to be good that train.on_bad_step=rollback could go "
        "back to: set train.save_every lower, lower optimizer.lr, or look at this step's data"
    )


def restore(trainer: Trainer, folder: Path) -> None:
    """Take from the logs of the run in `folder` what belongs to where `trainer` stands; collective."""
    text = json.dumps(_read(folder, trainer.step, trainer.consumed_samples)) if is_main() else ""
    found = json.loads(gather_text(text)[0])
    trainer.guard.restart(found["losses"])
    trainer.held_out_curve = [(step, loss) for step, loss in found["held_out"]]
    trainer.bad = BadSteps(**found["bad"])


def _read(folder: Path, step: int, consumed_samples: int) -> dict[str, Any]:
    losses = [line["loss"] for line in _lines(folder / METRICS_NAME, step) if not line.get("skipped")]
    held_out = [(line["step"], line["held_out_loss"]) for line in _lines(folder / EVALUATIONS_NAME, step)]
    bad = [line for line in _all_lines(folder / BAD_STEPS_NAME) if line["first_sample"] < consumed_samples]
    in_a_row, end = 0, consumed_samples
    for line in reversed(bad):
        if line["action"] != SKIP or line["first_sample"] + line["samples"] != end:
            break
        in_a_row, end = in_a_row + 1, line["first_sample"]
    rollbacks = sum(line["action"] == ROLLBACK for line in bad)
    return {
        "losses": [loss for loss in losses if loss is not None][-WINDOW:],
        "held_out": held_out,
        "bad": asdict(BadSteps(in_a_row=in_a_row, rollbacks=rollbacks)),
    }


def _lines(path: Path, step: int) -> list[dict[str, Any]]:
    return [line for line in _all_lines(path) if step > 0 and line["step"] <= step]


def _all_lines(path: Path) -> list[dict[str, Any]]:
    return list(read_metrics(path)) if path.exists() else []


def append_line(path: Path, values: dict[str, Any]) -> None:
    """A line of a log that is JSON in each."""
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(values) + "\n")


def cut_logs(folder: Path, step: int, consumed_samples: int) -> None:
    """Drop from the logs what a run that goes on from this step and this position in the data will write again.

    `MetricsWriter` does the same to its own.
    """
    _keep(folder / BAD_STEPS_NAME, lambda line: line["first_sample"] < consumed_samples)
    _keep(folder / STRAGGLERS_NAME, lambda line: line["step"] <= step)


def _keep(path: Path, is_kept: Callable[[dict[str, Any]], bool]) -> None:
    if path.exists():
        write_text(path, "".join(json.dumps(line) + "\n" for line in _all_lines(path) if is_kept(line)))

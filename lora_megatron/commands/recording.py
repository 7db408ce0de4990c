# SPDX-License-Identifier: Apache-2.0
"""Training with its record in the run folder: metrics, evaluations, progress and checkpoints.

Only rank 0 writes; what it meets on the disk all ranks raise, so that none waits for it in a collective.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from lora_megatron.checkpoint.folder import disk_errors
from lora_megatron.commands.saving import Saver
from lora_megatron.commands.summary import Run, continuations
from lora_megatron.measure.console import TrainingProgress
from lora_megatron.measure.metrics import MetricsWriter
from lora_megatron.parallel.agree import together
from lora_megatron.training.loop import StepReport, train

T = TypeVar("T")


def on_disk(run: Run, action: Callable[[], T]) -> T:
    """Let each rank do something in the run folder; if one cannot, all ranks raise the CheckpointError."""

    def act() -> T:
        with disk_errors(Path(run.config.run.dir)):
            return action()

    return together(act)


def on_main_disk(run: Run, action: Callable[[], object]) -> None:
    """The same, on rank 0 alone."""
    on_disk(run, lambda: action() if run.ranks.is_main else None)


def train_and_record(run: Run, identity: dict[str, Any], adapter_facts: dict[str, Any]) -> None:
    """Train to the last step; `identity` and `adapter_facts` go into every checkpoint.

    Raises:
        NumericalError: see `training.loop.train`.
        CheckpointError: something cannot be written.
    """
    trainer, config, ranks = run.trainer, run.config, run.ranks
    if trainer.step == 0:
        run.before = continuations(run)
    progress = TrainingProgress(
        config.train.steps, first_step=trainer.step, enabled=ranks.is_main, description=run.method.name
    )
    with _metrics(run) as metrics, progress, Saver(run, identity, adapter_facts) as saver:

        def look_after_save(*values: float) -> None:
            # A run that is about to end must know, and name, the newest checkpoint that there is.
            saver.look() if all(map(math.isfinite, values)) else saver.wait()

        def on_step(report: StepReport) -> None:
            run.reports.append(report)
            values = asdict(report)
            on_main_disk(run, lambda: metrics.write(values.pop("step"), values))
            look_after_save(report.loss, report.grad_norm)
            progress.update(
                report.step,
                loss=report.loss,
                lr=report.lr,
                tokens_per_second=report.tokens_per_second_per_rank * ranks.world_size,
            )

        def on_evaluation(step: int, loss: float) -> None:
            on_main_disk(run, lambda: metrics.write_evaluation(step, loss))
            progress.note(f"held-out loss {loss:.4f} after step {step}")
            look_after_save(loss)

        train(trainer, on_step=on_step, on_evaluation=on_evaluation, save=saver.save)


@contextlib.contextmanager
def _metrics(run: Run) -> Iterator[MetricsWriter]:
    folder, step = Path(run.config.run.dir), run.trainer.step
    metrics = on_disk(run, lambda: MetricsWriter(folder, enabled=run.ranks.is_main, resumed_step=step))
    try:
        yield metrics
    except BaseException:
        with contextlib.suppress(OSError):  # what ended the run is what is told
            metrics.close()
        raise
    on_disk(run, metrics.close)

# SPDX-License-Identifier: Apache-2.0
"""Training with its record in the run folder: metrics, evaluations, progress and checkpoints.

Only rank 0 writes; what it meets on the disk all ranks raise, so that none waits for it in a collective.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from lora_megatron.checkpoint.folder import disk_errors
from lora_megatron.checkpoint.state import Progress, save_checkpoint
from lora_megatron.commands.summary import Run, continuations
from lora_megatron.measure.console import TrainingProgress
from lora_megatron.measure.metrics import MetricsWriter
from lora_megatron.model.names import named_parameters
from lora_megatron.parallel.agree import together
from lora_megatron.training.loop import StepReport, train
from lora_megatron.training.optimizer import trained

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
    with _metrics(run) as metrics, progress:

        def on_step(report: StepReport) -> None:
            run.reports.append(report)
            values = asdict(report)
            on_main_disk(run, lambda: metrics.write(values.pop("step"), values))
            progress.update(
                report.step,
                loss=report.loss,
                lr=report.lr,
                tokens_per_second=report.tokens_per_second_per_rank * ranks.world_size,
            )

        def on_evaluation(step: int, loss: float) -> None:
            on_main_disk(run, lambda: metrics.write_evaluation(step, loss))
            progress.note(f"held-out loss {loss:.4f} after step {step}")

        train(trainer, on_step=on_step, on_evaluation=on_evaluation, save=lambda: _save(run, identity, adapter_facts))


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


def _save(run: Run, identity: dict[str, Any], adapter_facts: dict[str, Any]) -> None:
    trainer = run.trainer
    parameters = trained(list(named_parameters(run.bare_chunks)))
    save_checkpoint(
        Path(run.config.run.dir),
        run.bare_chunks,
        lambda: trainer.optimizer.named_state(parameters),
        parameters,
        progress=Progress(trainer.step, trainer.consumed_samples),
        identity=identity,
        method=run.method,
        shape=run.base.shape,
        adapter_facts=adapter_facts,
        keep=run.config.train.keep_checkpoints,
    )

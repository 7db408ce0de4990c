# SPDX-License-Identifier: Apache-2.0
"""Training with its record in the run folder: metrics, evaluations, progress and checkpoints.

Only rank 0 writes; what it meets on the disk all ranks raise, so that none waits for it in a collective.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from lora_megatron.checkpoint.folder import disk_errors
from lora_megatron.checkpoint.state import set_aside_newer
from lora_megatron.commands.best import keep_best, recall_best
from lora_megatron.commands.grace import Grace, checkpoint_bytes
from lora_megatron.commands.history import BAD_STEPS_NAME, append_line, cut_logs, known_good_before, restore, resume
from lora_megatron.commands.saving import Saver
from lora_megatron.commands.summary import Run, continuations
from lora_megatron.measure.console import TrainingProgress
from lora_megatron.measure.metrics import MetricsWriter
from lora_megatron.measure.run_record import STRAGGLERS_NAME
from lora_megatron.parallel.agree import together
from lora_megatron.training.bad_steps import SKIP, BadStep
from lora_megatron.training.loop import Callbacks, StepReport, train
from lora_megatron.training.selection import Best
from lora_megatron.training.stragglers import Look, Stragglers

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
        NumericalError, Preempted: see `training.loop.train`.
        CheckpointError: something cannot be written.
    """
    trainer = run.trainer
    if trainer.step == 0:
        run.before = continuations(run)
    progress = TrainingProgress(
        trainer.steps, first_step=trainer.step, enabled=run.ranks.is_main, description=run.method.name
    )
    with _Record(run) as record, progress, Saver(run, identity, adapter_facts) as saver:
        recording = _Recording(run, identity, adapter_facts, record, progress, saver)
        train(
            trainer,
            Callbacks(
                on_step=recording.on_step,
                on_evaluation=recording.on_evaluation,
                keep_best=recording.keep_best,
                on_bad_step=recording.on_bad_step,
                save=saver.save,
                go_back=recording.go_back,
            ),
        )


class _Record:
    """The logs of a run, open from where its trainer stands; lines of what comes after that are dropped."""

    def __init__(self, run: Run) -> None:
        self._run, self.folder = run, Path(run.config.run.dir)
        self.reopen()

    def reopen(self) -> None:
        """Also after the trainer has gone back. Collective, as are all methods."""
        trainer, is_main = self._run.trainer, self._run.ranks.is_main
        on_main_disk(self._run, lambda: cut_logs(self.folder, trainer.step, trainer.consumed_samples))
        self._metrics = on_disk(
            self._run, lambda: MetricsWriter(self.folder, enabled=is_main, resumed_step=trainer.step)
        )

    def write(self, report: StepReport, **more: Any) -> None:
        """A line of metrics.jsonl."""
        values = {**asdict(report), **more}
        on_main_disk(self._run, lambda: self._metrics.write(values.pop("step"), values))

    def write_evaluation(self, step: int, loss: float, measured: dict[str, float]) -> None:
        """A line of evaluations.jsonl."""
        on_main_disk(self._run, lambda: self._metrics.write_evaluation(step, loss, measured))

    def write_bad_step(self, bad: BadStep) -> None:
        """A line of bad_steps.jsonl."""
        on_main_disk(self._run, lambda: append_line(self.folder / BAD_STEPS_NAME, asdict(bad)))

    def write_look(self, look: Look) -> None:
        """A line of stragglers.jsonl."""
        on_main_disk(self._run, lambda: append_line(self.folder / STRAGGLERS_NAME, asdict(look)))

    def close(self) -> None:
        """Nothing is written afterwards."""
        on_disk(self._run, self._metrics.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(OSError):  # what ended the run is what is told
            self._metrics.close()


@dataclass
class _Recording:
    """What is done after each step, good or bad."""

    run: Run
    identity: dict[str, Any]
    adapter_facts: dict[str, Any]
    record: _Record
    progress: TrainingProgress
    saver: Saver

    def __post_init__(self) -> None:
        self._grace = Grace(self.run, self.progress.note)
        self._grace.announce(checkpoint_bytes(self.run))
        is_alone = self.run.ranks.world_size == 1
        self._stragglers = Stragglers(0 if is_alone else self.run.config.train.straggler_every)

    def on_step(self, report: StepReport) -> None:
        self.run.reports.append(report)
        self.record.write(report)
        self.saver.look()
        self._grace.check(report.step_seconds, self.saver.seconds)
        if look := self._stragglers.after_step(report.step, report.step_seconds):
            self.record.write_look(look)
            if look.slowest is not None:
                self.progress.note(f"warning: rank {look.slowest} is slow after step {look.step}: {look.reason}")
        self.progress.update(
            report.step,
            loss=report.loss,
            lr=report.lr,
            tokens_per_second=report.tokens_per_second_per_rank * self.run.ranks.world_size,
        )

    def on_evaluation(self, step: int, loss: float, measured: dict[str, float]) -> None:
        self.record.write_evaluation(step, loss, measured)
        best = self.run.trainer.best
        shown = "".join(f", {name} {value:.4f}" for name, value in measured.items())
        mark = ", the best so far" if best is not None and best.step == step else ""
        self.progress.note(f"held-out loss {loss:.4f}{shown} after step {step}{mark}")
        # A run that is about to end must know, and name, the newest checkpoint that there is.
        self.saver.look() if math.isfinite(loss) else self.saver.wait()

    def keep_best(self, best: Best) -> None:
        self.saver.wait()  # what the best displaces is kept for the checkpoints that there are
        keep_best(self.run, best, self.adapter_facts)

    def on_bad_step(self, report: StepReport, bad: BadStep) -> None:
        self.record.write(report, **({"skipped": True} if bad.action == SKIP else {}))
        self.record.write_bad_step(bad)
        last = bad.first_sample + bad.samples - 1
        if bad.action == SKIP:
            self.progress.note(
                f"warning: {bad.message}: no update; samples {bad.first_sample} to {last} of the stream are left out "
                f"({self.run.trainer.bad.in_a_row} of at most {self.run.config.train.max_bad_steps} in a row)"
            )
        self.saver.look() if bad.action == SKIP else self.saver.wait()

    def go_back(self) -> None:
        """To the newest checkpoint known to be good, in place; the next step takes the samples after the bad ones."""
        trainer, config = self.run.trainer, self.run.config
        bad_step, position = trainer.step + 1, trainer.consumed_samples
        say = self.progress.note
        folder, progress = together(lambda: known_good_before(self.record.folder, trainer.step, self.identity, say))
        self.record.close()
        resume(trainer, folder, progress)
        trainer.consumed_samples = position
        on_main_disk(self.run, lambda: set_aside_newer(self.record.folder, trainer.step, say))
        self.record.reopen()
        restore(trainer, self.record.folder)
        trainer.best = recall_best(self.run, say)
        say(
            f"warning: went back from the bad step {bad_step} to {folder}; samples {progress.consumed_samples} to "
            f"{position - 1} of the stream are left out ({trainer.bad.rollbacks} of at most "
            f"{config.train.max_bad_steps} times)"
        )

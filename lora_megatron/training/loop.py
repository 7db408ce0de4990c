# SPDX-License-Identifier: Apache-2.0
"""The one training loop, for every method and layout."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel

from lora_megatron.checkpoint.state import known_good, step_of
from lora_megatron.config import Config
from lora_megatron.data.batches import BatchSource, Microbatches
from lora_megatron.errors import NumericalError, Preempted
from lora_megatron.measure.memory import ActivationMeter
from lora_megatron.parallel.heartbeat import beat
from lora_megatron.parallel.stopping import stop_if_asked, stop_on
from lora_megatron.training.bad_steps import ROLLBACK, STOP, BadStep, BadSteps, decide, error_of
from lora_megatron.training.cuda_graph import StepGraph
from lora_megatron.training.held_out import held_out_loss
from lora_megatron.training.length import ends_epoch, total_steps
from lora_megatron.training.optimizer import Optimizer, gradient_bytes
from lora_megatron.training.schedule import learning_rate
from lora_megatron.training.selection import Best, Selection
from lora_megatron.training.step import run_microbatches, where_not_finite
from lora_megatron.training.verdict import SpikeGuard, Verdict, judge

_METERED_STEPS = 3


@dataclass
class Trainer:
    """What a run holds on this rank, and where it stands (`step` of `steps`)."""

    config: Config
    chunks: Sequence[DistributedDataParallel]
    optimizer: Optimizer
    data: BatchSource
    held_out: BatchSource | None
    meter: ActivationMeter
    selection: Selection | None = None
    """What the best evaluation is chosen by; None: none is."""
    graph: StepGraph | None = None
    """What runs both passes of a step; None: they run eagerly."""
    step: int = 0
    """Updates of the model so far."""
    consumed_samples: int = 0
    """The position in the data stream; ahead of `step` by what bad steps have left out."""
    saved_step: int = 0
    """The newest step that needs no checkpoint any more."""
    steps_run: int = 0
    """Steps of this process; a resumed run starts at 0 again."""
    held_out_curve: list[tuple[int, float]] = field(default_factory=list)
    best: Best | None = None
    bad: BadSteps = field(default_factory=BadSteps)
    guard: SpikeGuard = field(init=False)
    steps: int = field(init=False)
    """Of the whole run, however long it was asked to be."""

    def __post_init__(self) -> None:
        self.steps = total_steps(self.config, rows=0 if self.config.train.epochs is None else len(self.data))
        self.guard = SpikeGuard(self.config.train.spike_factor)

    @property
    def metered(self) -> bool:
        """Whether to watch the next step's memory. A GPU's allocator counts by itself; on a CPU counting takes time,
        and as no shape ever changes, the first steps tell."""
        return torch.cuda.is_available() or self.steps_run < _METERED_STEPS


@dataclass(frozen=True)
class StepReport:
    """One line of metrics.jsonl."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    loss_tokens: int
    tokens_per_second_per_rank: float
    step_seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Callbacks:
    """What the loop leaves to those who keep the record of a run; each is called on every rank."""

    on_step: Callable[[StepReport], None]
    """After each good step."""
    on_evaluation: Callable[[int, float, dict[str, float]], None]
    """Held-out loss after a step, and by name what else was measured to choose by."""
    keep_best: Callable[[Best], None]
    """Write what is trained as the best so far; before the evaluation is recorded, or a kill in between would lose it.
    """
    on_bad_step: Callable[[StepReport, BadStep], None]
    """After each bad one, before anything is done about it."""
    save: Callable[[], None]
    """Write a checkpoint."""
    go_back: Callable[[], None]
    """Load the newest checkpoint known to be good; the position in the data stays."""


def train(trainer: Trainer, callbacks: Callbacks) -> None:
    """Run to the last step, calling back after each step, evaluation and due checkpoint.

    Raises:
        NumericalError: a loss, a gradient or a tensor to save is not finite, and the policy is, or has come to, `stop`.
            It names the newest checkpoint from which a finite step was taken.
        Preempted: a termination signal came to some rank; the step that the run stands at is saved.
    """
    try:
        if _evaluation_is_due(trainer):
            evaluate(trainer, callbacks)
        while trainer.step < trainer.steps:
            _run_step(trainer, callbacks)
        if trainer.graph is not None:
            trainer.graph.release()  # what comes after training needs memory too
        stop_if_asked()
    except Preempted as preempted:
        if trainer.step != trainer.saved_step:
            _save(trainer, callbacks)
        preempted.step = trainer.step
        raise


def _run_step(trainer: Trainer, callbacks: Callbacks) -> None:
    """One step, good or bad, and what is due after it."""
    first_sample = trainer.consumed_samples
    report, verdict = train_step(trainer)
    if verdict.problem:
        bad = decide(trainer.config, trainer.bad, verdict, step=report.step, first_sample=first_sample)
        callbacks.on_bad_step(report, bad)  # before the end: a run that ends here must show why in its log
        if bad.action == STOP:
            raise error_of(bad, trainer.config, lambda: _where_to_resume(trainer))
        if bad.action == ROLLBACK:
            callbacks.go_back()
        stop_on(verdict.signal)
        return
    trainer.step = report.step
    trainer.bad.in_a_row = 0
    trainer.guard.accept(report.loss)
    callbacks.on_step(report)
    _require_gradient(report)
    stop_on(verdict.signal)
    if _evaluation_is_due(trainer):
        evaluate(trainer, callbacks)
    save_every = trainer.config.train.save_every
    if trainer.step == trainer.steps or (save_every and trainer.step % save_every == 0):
        _save(trainer, callbacks)


def _evaluation_is_due(trainer: Trainer) -> bool:
    """Whether the held-out loss of this step belongs into the log and is not there: a stopped run makes up for it."""
    every, step = trainer.config.train.eval_every, trainer.step
    if every == "epoch":
        batch = trainer.config.data.global_batch_size
        due = step == trainer.steps > 0 or ends_epoch(step, rows=len(trainer.data), batch=batch)
    else:
        due = step == trainer.steps > 0 or bool(every and step % every == 0)
    return due and step not in (evaluated for evaluated, _ in trainer.held_out_curve)


def _save(trainer: Trainer, callbacks: Callbacks) -> None:
    _write(trainer, callbacks.save)
    trainer.saved_step = trainer.step


def _write(trainer: Trainer, save: Callable[[], None]) -> None:
    beat("save")
    try:
        save()
    except NumericalError as error:
        raise NumericalError(f"after step {trainer.step}: {error}; {_where_to_resume(trainer)}") from None


def train_step(trainer: Trainer) -> tuple[StepReport, Verdict]:
    """One optimizer step on the next global batch; no update if the verdict names a problem."""
    config, optimizer = trainer.config, trainer.optimizer
    step = trainer.step + 1
    beat("step", step=step)
    started = time.perf_counter()
    batches = microbatches_of_step(trainer.data, trainer.consumed_samples, config.data.global_batch_size)
    lr = learning_rate(
        step,
        peak=config.optimizer.lr,
        warmup_steps=config.train.warmup_steps,
        steps=trainer.steps,
        schedule=config.train.schedule,
    )
    optimizer.set_lr(lr)
    optimizer.zero_grad()
    with trainer.meter if trainer.metered else contextlib.nullcontext():
        run = run_microbatches if trainer.graph is None else trainer.graph.run_microbatches
        loss = run(trainer.chunks, batches)
        verdict = judge(loss, trainer.chunks, trainer.guard)
        beat("optimizer")
        norm = math.nan if verdict.problem else optimizer.step(loss.tokens)
    if not verdict.problem and not math.isfinite(norm):  # finite gradients, whose squares sum up to infinity
        verdict = replace(verdict, problem=f"gradient norm is {norm}", where=where_not_finite(()))
    trainer.consumed_samples += config.data.global_batch_size
    trainer.steps_run += 1
    seconds = time.perf_counter() - started
    tokens = config.data.global_batch_size * config.data.sequence_length
    report = StepReport(
        step=step,
        loss=loss.mean,
        grad_norm=norm,
        lr=lr,
        tokens=tokens,
        loss_tokens=loss.tokens,
        tokens_per_second_per_rank=tokens / seconds / torch.distributed.get_world_size(),
        step_seconds=seconds,
        peak_memory_bytes=trainer.meter.memory(
            gradients=gradient_bytes(trainer.chunks), optimizer=optimizer.state_bytes()
        ).peak,
    )
    return report, verdict


def microbatches_of_step(data: BatchSource, consumed: int, global_batch_size: int) -> Microbatches:
    """This data-parallel rank's microbatches of the global batch that starts at sample `consumed`.

    Microbatch m of rank d holds samples consumed + (m * DP + d) * b onwards, so the global batch is the same set of
    samples for every data-parallel size.
    """
    rank, size, b = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size(), data.micro_batch_size
    numbers = range(global_batch_size // (b * size))
    return Microbatches(numbers, lambda m: data.microbatch(consumed + (m * size + rank) * b))


def evaluate(trainer: Trainer, callbacks: Callbacks) -> None:
    """Held-out loss now, if there is held-out data, and whether it is the best; collective.

    Raises NumericalError when it is not finite.
    """
    if trainer.held_out is None:
        return
    beat("evaluation")
    loss = held_out_loss(trainer.chunks, trainer.held_out)
    measured = _select(trainer, loss.mean, callbacks) if math.isfinite(loss.mean) else {}
    trainer.held_out_curve.append((trainer.step, loss.mean))
    callbacks.on_evaluation(trainer.step, loss.mean, measured)
    if not math.isfinite(loss.mean):
        raise NumericalError(
            f"held-out loss is {loss.mean} after step {trainer.step} ({loss.where}): training stopped and nothing of "
            f"this step was saved; {_where_to_resume(trainer)}; lower optimizer.lr or optimizer.weight_decay, or set "
            "optimizer.clip_grad"
        )


def _select(trainer: Trainer, loss: float, callbacks: Callbacks) -> dict[str, float]:
    """Keep what is trained if it is the best so far, after at least one step; what was measured to know."""
    selection = trainer.selection
    if selection is None:
        return {}
    value = selection.measure(trainer.chunks) if selection.measure else loss
    if trainer.step and selection.improves(value, over=trainer.best):
        best = Best(trainer.step, value)
        _write(trainer, lambda: callbacks.keep_best(best))
        trainer.best = best
    return {selection.name: value} if selection.measure else {}


def _where_to_resume(trainer: Trainer) -> str:
    """Which checkpoint to go back to. The newest one may hold parameters that are finite and give NaN at once."""
    good = known_good(Path(trainer.config.run.dir), trainer.step)
    if good is None:
        return "no checkpoint is known to be good"
    return f"the newest checkpoint known to be good is that of step {step_of(good)} (run.resume={good})"


def _require_gradient(report: StepReport) -> None:
    if report.step == 2 and report.grad_norm == 0.0 and report.loss_tokens:
        raise NumericalError("the gradient norm is 0 at step 2: no gradient reaches the trained parameters")

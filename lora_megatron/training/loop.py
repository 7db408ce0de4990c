# SPDX-License-Identifier: Apache-2.0
"""The one training loop, for every method and layout."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel

from lora_megatron.checkpoint.state import known_good, step_of
from lora_megatron.config import Config
from lora_megatron.data.batches import BatchSource, Microbatches
from lora_megatron.errors import NumericalError
from lora_megatron.measure.memory import ActivationMeter
from lora_megatron.parallel.agree import device_for_collectives, gather_text
from lora_megatron.training.held_out import held_out_loss
from lora_megatron.training.optimizer import Optimizer, gradient_bytes
from lora_megatron.training.schedule import learning_rate
from lora_megatron.training.step import run_microbatches, where_not_finite

_METERED_STEPS = 3


@dataclass
class Trainer:
    """What a run holds on this rank, and where it stands (`step` of `config.train.steps`)."""

    config: Config
    chunks: Sequence[DistributedDataParallel]
    optimizer: Optimizer
    data: BatchSource
    held_out: BatchSource | None
    meter: ActivationMeter
    step: int = 0
    steps_run: int = 0
    """Steps of this process; a resumed run starts at 0 again."""
    held_out_curve: list[tuple[int, float]] = field(default_factory=list)

    @property
    def consumed_samples(self) -> int:
        """Samples the run has trained on; the position in the data stream."""
        return self.step * self.config.data.global_batch_size

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


def train(
    trainer: Trainer,
    *,
    on_step: Callable[[StepReport], None],
    on_evaluation: Callable[[int, float], None],
    save: Callable[[], None],
) -> None:
    """Run to `train.steps`, calling back after each step, evaluation and due checkpoint.

    Raises:
        NumericalError: a loss, a gradient or a tensor to save is not finite. It names the newest checkpoint from which
            a finite step was taken.
    """
    section = trainer.config.train
    if section.eval_every and trainer.step == 0:
        evaluate(trainer, on_evaluation)
    while trainer.step < section.steps:
        report, bad_ranks = train_step(trainer)
        on_step(report)  # before the check: a run that ends here must show why in its log
        _require_finite(trainer, report, bad_ranks)
        trainer.step = report.step
        last = trainer.step == section.steps
        if last or (section.eval_every and trainer.step % section.eval_every == 0):
            evaluate(trainer, on_evaluation)
        if last or (section.save_every and trainer.step % section.save_every == 0):
            try:
                save()
            except NumericalError as error:
                raise NumericalError(f"after step {trainer.step}: {error}; {_where_to_resume(trainer)}") from None


def train_step(trainer: Trainer) -> tuple[StepReport, tuple[int, ...]]:
    """One optimizer step on one global batch; no update if loss or gradients are not finite (then: on which ranks)."""
    config, optimizer = trainer.config, trainer.optimizer
    step = trainer.step + 1
    started = time.perf_counter()
    batches = microbatches_of_step(trainer.data, trainer.consumed_samples, config.data.global_batch_size)
    lr = learning_rate(
        step,
        peak=config.optimizer.lr,
        warmup_steps=config.train.warmup_steps,
        steps=config.train.steps,
        schedule=config.train.schedule,
    )
    optimizer.set_lr(lr)
    optimizer.zero_grad()
    with trainer.meter if trainer.metered else contextlib.nullcontext():
        loss = run_microbatches(trainer.chunks, batches)
        bad_ranks = loss.bad_ranks if not math.isfinite(loss.mean) else _ranks_with_bad_gradients(trainer.chunks)
        norm = optimizer.step() if math.isfinite(loss.mean) and not bad_ranks else math.nan
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
    return report, bad_ranks


def microbatches_of_step(data: BatchSource, consumed: int, global_batch_size: int) -> Microbatches:
    """This data-parallel rank's microbatches of the global batch that starts at sample `consumed`.

    Microbatch m of rank d holds samples consumed + (m * DP + d) * b onwards, so the global batch is the same set of
    samples for every data-parallel size.
    """
    rank, size, b = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size(), data.micro_batch_size
    numbers = range(global_batch_size // (b * size))
    return Microbatches(numbers, lambda m: data.microbatch(consumed + (m * size + rank) * b))


def evaluate(trainer: Trainer, on_evaluation: Callable[[int, float], None]) -> None:
    """Held-out loss now, if there is held-out data; collective. Raises NumericalError when it is not finite."""
    if trainer.held_out is None:
        return
    loss = held_out_loss(trainer.chunks, trainer.held_out)
    trainer.held_out_curve.append((trainer.step, loss.mean))
    on_evaluation(trainer.step, loss.mean)
    if not math.isfinite(loss.mean):
        raise NumericalError(
            f"held-out loss is {loss.mean} after step {trainer.step} ({loss.where}): training stopped and nothing of "
            f"this step was saved; {_where_to_resume(trainer)}; lower optimizer.lr or optimizer.weight_decay, or set "
            "optimizer.clip_grad"
        )


def _where_to_resume(trainer: Trainer) -> str:
    """Which checkpoint to go back to. The newest one may hold parameters that are finite and give NaN at once."""
    good = known_good(Path(trainer.config.run.dir), trainer.step)
    if good is None:
        return "no checkpoint is known to be good"
    return f"the newest checkpoint known to be good is that of step {step_of(good)} (run.resume={good})"


def _require_finite(trainer: Trainer, report: StepReport, bad_ranks: tuple[int, ...]) -> None:
    """Stop before a value that is not finite can spread; the values are the same on every rank, so all raise."""
    if report.step == 2 and report.grad_norm == 0.0 and report.loss_tokens:
        raise NumericalError("the gradient norm is 0 at step 2: no gradient reaches the trained parameters")
    for name, value in (("loss", report.loss), ("gradient norm", report.grad_norm)):
        if not math.isfinite(value):
            raise NumericalError(
                f"{name} is {value} at step {report.step} ({where_not_finite(bad_ranks)}): training stopped and no "
                f"update was applied; {_where_to_resume(trainer)}; lower optimizer.lr, set optimizer.clip_grad, or "
                "look at this step's data"
            )


def _ranks_with_bad_gradients(chunks: Sequence[DistributedDataParallel]) -> tuple[int, ...]:
    """Ranks with a gradient that is not finite; collective.

    The gradient norm would not tell: it counts a replicated parameter on one tensor rank only.
    """
    largest = [torch.linalg.vector_norm(b.grad_data, math.inf) for chunk in chunks for b in chunk.buffers]
    zero = torch.zeros((), device=device_for_collectives())
    bad = (~torch.isfinite(torch.stack([zero, *(value.to(zero) for value in largest)]))).any()
    anywhere = bad.int()
    torch.distributed.all_reduce(anywhere, torch.distributed.ReduceOp.MAX)
    if not int(anywhere):
        return ()
    return tuple(rank for rank, text in enumerate(gather_text("bad" if bad else "")) if text)

# SPDX-License-Identifier: Apache-2.0
"""One case, that is one method on one slice (or the whole) of the model: built, stepped, watched, and freed again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import nn

from lora_megatron.bench.communication import Communication, profile
from lora_megatron.bench.timing import StepSeconds, TimedOptimizer, slowest_of_each, timed_step
from lora_megatron.bench.workload import Load, bench_config, build_trainer, free, slice_of
from lora_megatron.config import Config
from lora_megatron.errors import OutOfMemoryAlone
from lora_megatron.layers.sharding import shard_of
from lora_megatron.measure.memory import MemoryByKind, gather_memory
from lora_megatron.measure.units import show_bytes
from lora_megatron.model.names import named_parameters
from lora_megatron.model.shape import ModelShape
from lora_megatron.parallel.agree import gather_text
from lora_megatron.parallel.groups import device_memory_bytes
from lora_megatron.training.cuda_graph import WARM_UP_STEPS
from lora_megatron.training.loop import StepReport, Trainer
from lora_megatron.training.optimizer import Optimizer, gradient_bytes


@dataclass(frozen=True)
class Case:
    """What is built and measured at one time."""

    method: str
    layers: int

    def __str__(self) -> str:
        return f"{self.method}, {self.layers} layer{'s' if self.layers > 1 else ''}"


@dataclass(frozen=True)
class Effort:
    """How many steps one visit to a case takes."""

    steps: int
    warm_up: int
    profiled: int = 0
    """After the measured ones, which a profiler would slow down."""


@dataclass(frozen=True)
class Measured:
    """What a visit to a case found; the same on every rank."""

    case: Case
    steps: list[StepSeconds]
    """Of every measured step the slowest rank's times."""
    memory: list[MemoryByKind]
    """Of every rank."""
    trainable_parameters: int
    total_parameters: int
    """Of the unsharded model (or slice)."""
    first_loss: float
    last_loss: float
    communication: list[Communication]
    """Of every rank; empty where no step was profiled, or a rank's profiler saw nothing."""
    left_bytes: int = 0
    """GPU: bytes of this rank that were allocated after the case was freed and not before it was built."""


@dataclass(frozen=True)
class OutOfMemory:
    """A case that did not fit a world of one, or was not tried in a larger one (see `visit`)."""

    case: Case
    reason: str


def visit(
    case: Case,
    config: Config,
    shape: ModelShape,
    effort: Effort,
    *,
    load: Load | None,
    planned_bytes: int,
    on_step: Callable[[StepReport], None],
) -> Measured | OutOfMemory:
    """Build a case, take its steps, and free it; `shape` is the whole model's. Collective.

    Raises:
        OutOfMemoryAlone: out of memory in a world of several ranks.
        NumericalError: a step made no update.
    """
    before = _allocated()
    outcome: Measured | OutOfMemory
    try:
        outcome = _measure(case, config, slice_of(shape, case.layers), effort, load=load, on_step=on_step)
    except torch.OutOfMemoryError:
        outcome = OutOfMemory(case, f"out of memory; plan: {show_bytes(planned_bytes)}")
    free()  # not before the exception is gone: its traceback holds the model
    if isinstance(outcome, OutOfMemory):
        if dist.get_world_size() > 1:
            raise OutOfMemoryAlone(outcome_text(outcome))
        return outcome
    return replace(outcome, left_bytes=max(0, _allocated() - before))


def outcome_text(outcome: OutOfMemory) -> str:
    """One line with the remedies."""
    return (
        f"{outcome.case}: {outcome.reason} of {show_bytes(device_memory_bytes())}; leave the method out of --methods, "
        "lower --layers or data.micro_batch_size, set train.recompute=full, or raise parallel.tensor or pipeline"
    )


def _measure(
    case: Case,
    config: Config,
    shape: ModelShape,
    effort: Effort,
    *,
    load: Load | None,
    on_step: Callable[[StepReport], None],
) -> Measured:
    trainer = build_trainer(bench_config(config, case.method), shape, load=load)
    trainer.optimizer = cast(Optimizer, TimedOptimizer(trainer.optimizer))
    losses: list[float] = []
    seconds: list[StepSeconds] = []
    while len(seconds) < effort.steps:
        warming = trainer.step < effort.warm_up or _is_metered(trainer) or _is_still_eager(trainer)
        taken, report = timed_step(trainer)
        losses.append(report.loss)
        if not warming:
            seconds.append(taken)
            on_step(report)
    memory = trainer.meter.memory(gradients=gradient_bytes(trainer.chunks), optimizer=trainer.optimizer.state_bytes())
    communication = profile(lambda: timed_step(trainer)[0].whole, steps=effort.profiled)
    trainable, total = _count_parameters([chunk.module for chunk in trainer.chunks])
    return Measured(
        case=case,
        steps=slowest_of_each(seconds),
        memory=gather_memory(memory),
        trainable_parameters=trainable,
        total_parameters=total,
        first_loss=losses[0],
        last_loss=losses[-1],
        communication=_gather(communication),
    )


def _gather(mine: Communication | None) -> list[Communication]:
    """Every rank's, on every rank; none where one has none. Collective."""
    found = [json.loads(text) for text in gather_text(json.dumps(mine and asdict(mine)))]
    return [Communication(**each) for each in found] if all(found) else []


def _is_metered(trainer: Trainer) -> bool:
    """On a CPU the first steps are watched tensor by tensor, which takes time: they only warm up."""
    return trainer.metered and not torch.cuda.is_available()


def _is_still_eager(trainer: Trainer) -> bool:
    """Steps before a CUDA graph is captured, and the one that captures it, are not what a training mostly runs."""
    graph = trainer.graph
    return graph is not None and not graph.is_captured and trainer.steps_run <= WARM_UP_STEPS


def _count_parameters(chunks: list[nn.Module]) -> tuple[int, int]:
    """(trained, all) parameters of the unsharded model; collective."""
    trained, total = 0, 0
    if mpu.get_tensor_model_parallel_rank() == 0 and mpu.get_data_parallel_rank() == 0:
        for named in named_parameters(chunks):
            if named.is_copy:
                continue
            parameter = named.parameter
            size = mpu.get_tensor_model_parallel_world_size()
            count = math.prod(shard_of(parameter).full_shape(parameter.shape, size))
            total += count
            trained += count if parameter.requires_grad else 0
    pairs = [json.loads(text) for text in gather_text(json.dumps([trained, total]))]
    return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0

# SPDX-License-Identifier: Apache-2.0
"""Cases, each one method on one slice (or the whole) of the model: built, stepped, watched, and freed again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeVar, cast

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

Found = TypeVar("Found")


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
    """GPU: bytes of this rank that were allocated after the case was freed and not before it was built; not looked at
    where cases stand beside each other."""


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

    def measure() -> Measured:
        running = _Running(case, config, slice_of(shape, case.layers), load=load)
        running.warm_up(effort.warm_up)
        running.take(effort.steps, on_step)
        return running.measured(running.memory(), profiled=effort.profiled)

    outcome = _freed(case, measure, planned_bytes)
    return outcome if isinstance(outcome, OutOfMemory) else replace(outcome, left_bytes=max(0, _allocated() - before))


def visit_in_turns(
    cases: Sequence[tuple[Case, Config]], shape: ModelShape, effort: Effort, *, turn: int, planned_bytes: int
) -> list[Measured] | OutOfMemory:
    """The same of cases that stand beside each other and take `turn` steps each, in turns, A B B A A B: a clock that
    wanders for longer than that does the same to all. Nothing is profiled, and weights are random.

    Peak and activations of each are without what stood there before it, so what the first makes for the process (a
    library's workspaces, tables) counts to it alone; reserved memory is that of all. Raises as `visit`.
    """

    def measure() -> list[Measured]:
        every, memory = list[_Running](), list[MemoryByKind]()
        for case, config in cases:
            beside = _allocated()
            running = _Running(case, config, slice_of(shape, case.layers), load=None)
            running.warm_up(effort.warm_up)
            every.append(running)
            memory.append(_without(beside, running.memory()))
        order = list(every)
        for start in range(0, effort.steps, turn):
            for running in order:
                running.take(min(turn, effort.steps - start), lambda report: None)
            order.reverse()
        return [running.measured(own) for running, own in zip(every, memory, strict=True)]

    return _freed(cases[0][0], measure, planned_bytes)


def _without(beside: int, memory: MemoryByKind) -> MemoryByKind:
    """Of a case, what was not there before it."""
    return replace(memory, activations=max(0, memory.activations - beside), peak=memory.peak - beside)


def _freed(case: Case, measure: Callable[[], Found], planned_bytes: int) -> Found | OutOfMemory:
    """What is measured; and everything that it built is gone."""
    outcome: Found | OutOfMemory
    try:
        outcome = measure()
    except torch.OutOfMemoryError:
        outcome = OutOfMemory(case, f"out of memory; plan: {show_bytes(planned_bytes)}")
    free()  # not before the exception is gone: its traceback holds the model
    if isinstance(outcome, OutOfMemory) and dist.get_world_size() > 1:
        raise OutOfMemoryAlone(outcome_text(outcome))
    return outcome


def outcome_text(outcome: OutOfMemory) -> str:
    """One line with the remedies."""
    return (
        f"{outcome.case}: {outcome.reason} of {show_bytes(device_memory_bytes())}; leave the method out of --methods, "
        "lower --layers or data.micro_batch_size, set train.recompute=full, or raise parallel.tensor or pipeline"
    )


class _Running:
    """A case that is built, and steps."""

    def __init__(self, case: Case, config: Config, shape: ModelShape, *, load: Load | None) -> None:
        """`shape`: the slice's."""
        self._case = case
        self._trainer = build_trainer(bench_config(config, case.method), shape, load=load)
        self._trainer.optimizer = cast(Optimizer, TimedOptimizer(self._trainer.optimizer))
        self._losses: list[float] = []
        self._seconds: list[StepSeconds] = []

    def warm_up(self, steps: int) -> None:
        """So many steps, and as many more as are not like those that a training mostly runs."""
        trainer = self._trainer
        while trainer.step < steps or _is_metered(trainer) or _is_still_eager(trainer):
            self._step()

    def take(self, steps: int, on_step: Callable[[StepReport], None]) -> None:
        """Measured ones."""
        for _ in range(steps):
            taken, report = self._step()
            self._seconds.append(taken)
            on_step(report)

    def _step(self) -> tuple[StepSeconds, StepReport]:
        taken, report = timed_step(self._trainer)
        self._losses.append(report.loss)
        return taken, report

    def memory(self) -> MemoryByKind:
        """On this rank, of the steps so far."""
        trainer = self._trainer
        state_bytes = trainer.optimizer.state_bytes()
        return trainer.meter.memory(gradients=gradient_bytes(trainer.chunks), optimizer=state_bytes)

    def measured(self, memory: MemoryByKind, *, profiled: int = 0) -> Measured:
        """All that was found, with this rank's memory; collective."""
        communication = profile(lambda: timed_step(self._trainer)[0].whole, steps=profiled)
        trainable, total = _count_parameters([chunk.module for chunk in self._trainer.chunks])
        return Measured(
            case=self._case,
            steps=slowest_of_each(self._seconds),
            memory=gather_memory(memory),
            trainable_parameters=trainable,
            total_parameters=total,
            first_loss=self._losses[0],
            last_loss=self._losses[-1],
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

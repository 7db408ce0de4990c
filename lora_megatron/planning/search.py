# SPDX-License-Identifier: Apache-2.0
"""Layouts that fit: all of so many GPUs, the nearest to a configuration, and the fewest GPUs.

Tried are tensor x pipeline sizes with what is left for data parallelism, sequence parallelism on and off, the three
choices of recomputation, and micro-batch sizes in powers of two; the interleaved schedule is not. The tensor size stays
within a node. What `model.checks` refuses is left out, and every size is that of a model really built.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from lora_megatron.config import Config
from lora_megatron.config.sections import TrainSection
from lora_megatron.errors import ConfigError
from lora_megatron.methods.method import Method
from lora_megatron.model.checks import check_plan, layout_of
from lora_megatron.model.shape import ModelShape
from lora_megatron.planning.gpus import NODE, Gpu
from lora_megatron.planning.memory import MemoryPlan, Place, plan_rank
from lora_megatron.planning.plan import stage_weights
from lora_megatron.planning.speed import Speed, estimate_speed
from lora_megatron.planning.weights import Weight

_MOST_GPUS = 4096
_RECOMPUTE: tuple[str, ...] = get_args(TrainSection.model_fields["recompute"].annotation)
CHOICES = (
    ("parallel", "tensor"),
    ("parallel", "pipeline"),
    ("parallel", "virtual_pipeline"),
    ("parallel", "sequence"),
    ("train", "recompute"),
    ("data", "micro_batch_size"),
)
"""The settings a search changes."""


@dataclass(frozen=True)
class Candidate:
    """A layout that fits."""

    config: Config
    world_size: int
    needed: int
    """Bytes of the rank that needs most."""
    speed: Speed

    @property
    def data_size(self) -> int:
        return self.world_size // layout_of(self.config).model_size

    def changes(self, other: Config) -> dict[str, Any]:
        """The settings by which this layout is not `other`'s: `section.key` -> value here."""
        here = {f"{section}.{key}": getattr(getattr(self.config, section), key) for section, key in CHOICES}
        there = {f"{section}.{key}": getattr(getattr(other, section), key) for section, key in CHOICES}
        return {name: value for name, value in here.items() if value != there[name]}


def search_layouts(
    config: Config, shape: ModelShape, method: Method, *, world_size: int, gpu: Gpu, memory: float
) -> list[Candidate]:
    """Every layout of `world_size` GPUs of `memory` bytes that holds the training, the fastest first.

    Of layouts that differ in recomputation only, the one that recomputes least: the others are slower.
    """
    found = _fitting(config, shape, method, world_size, gpu, memory, _RECOMPUTE)
    return sorted(found, key=lambda candidate: -candidate.speed.tokens_per_second)


def nearest_fit(
    config: Config, shape: ModelShape, method: Method, *, world_size: int, gpu: Gpu, memory: float
) -> Candidate | None:
    """The layout that fits and changes the fewest settings of `config`, of these the fastest: on as many GPUs, and if
    there is none, on the fewest that do. None if no size up to 4096 fits."""
    own = config.train.recompute
    order = (own, *(choice for choice in _RECOMPUTE if choice != own))
    found = list(_fitting(config, shape, method, world_size, gpu, memory, order))
    if found:
        return min(found, key=lambda c: (len(c.changes(config)), -c.speed.tokens_per_second))
    return fewest_gpus(config, shape, method, gpu=gpu, memory=memory)


def fewest_gpus(config: Config, shape: ModelShape, method: Method, *, gpu: Gpu, memory: float) -> Candidate | None:
    """The layout with the fewest GPUs that fits, without data parallelism; None if none of up to 4096 does."""
    grids = sorted(
        (
            (tensor, pipeline)
            for tensor in _sizes(NODE)
            for pipeline in range(1, min(shape.num_layers, _MOST_GPUS // tensor) + 1)
            if shape.num_layers % pipeline == 0
        ),
        key=lambda grid: (grid[0] * grid[1], grid[1]),
    )
    for tensor, pipeline in grids:
        found = list(_of_grid(config, shape, method, tensor, pipeline, tensor * pipeline, gpu, memory, _RECOMPUTE))
        if found:
            return max(found, key=lambda candidate: candidate.speed.tokens_per_second)
    return None


def _sizes(most: int) -> Iterator[int]:
    """1, 2, 4, ... up to `most`."""
    size = 1
    while size <= most:
        yield size
        size *= 2


def _fitting(
    config: Config,
    shape: ModelShape,
    method: Method,
    world_size: int,
    gpu: Gpu,
    memory: float,
    recompute: Sequence[str],
) -> Iterator[Candidate]:
    for tensor in range(1, min(NODE, world_size) + 1):
        for pipeline in range(1, min(shape.num_layers, world_size // tensor) + 1):
            if world_size % (tensor * pipeline) == 0 and shape.num_layers % pipeline == 0:
                yield from _of_grid(config, shape, method, tensor, pipeline, world_size, gpu, memory, recompute)


def _of_grid(
    config: Config,
    shape: ModelShape,
    method: Method,
    tensor: int,
    pipeline: int,
    world_size: int,
    gpu: Gpu,
    memory: float,
    recompute: Sequence[str],
) -> Iterator[Candidate]:
    """The layouts with these tensor and pipeline sizes that fit."""
    stages: list[list[Weight]] = []
    data_size = world_size // (tensor * pipeline)
    most, own = config.data.global_batch_size // data_size, config.data.micro_batch_size
    for sequence in (False, True) if tensor > 1 else (False,):
        for size in sorted({*_sizes(most), own}):
            possible = fitted = False
            for choice in recompute:
                changed = _with(config, tensor, pipeline, sequence=sequence, recompute=choice, samples=size)
                possible = possible or _is_possible(changed, shape, method, world_size)
                if not possible:
                    break
                stages = stages or stage_weights(changed, shape, method)
                plans = plan_stages(changed, shape, method, stages, data_size=data_size)
                needed = max(plan.total for plan in plans)
                if needed <= memory:
                    fitted = True
                    speed = estimate_speed(changed, shape, method, plans, gpu=gpu, world_size=world_size)
                    yield Candidate(changed, world_size, needed, speed)
                    break
            if possible and not fitted:
                break  # a larger microbatch needs more


def _with(config: Config, tensor: int, pipeline: int, *, sequence: bool, recompute: str, samples: int) -> Config:
    cut = {"tensor": tensor, "pipeline": pipeline, "virtual_pipeline": 1, "context": 1, "sequence": sequence}
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=cut),
            "train": config.train.model_copy(update={"recompute": recompute}),
            "data": config.data.model_copy(update={"micro_batch_size": samples}),
        }
    )


def _is_possible(config: Config, shape: ModelShape, method: Method, world_size: int) -> bool:
    try:
        check_plan(config, shape, method, world_size)
    except ConfigError:
        return False
    return True


def plan_stages(
    config: Config, shape: ModelShape, method: Method, stages: Sequence[Sequence[Weight]], *, data_size: int
) -> list[MemoryPlan]:
    """The memory of the first data-parallel rank of each stage."""
    return [
        plan_rank(config, shape, method, weights, Place(stage, 0, data_size)) for stage, weights in enumerate(stages)
    ]

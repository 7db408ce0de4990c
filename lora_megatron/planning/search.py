# SPDX-License-Identifier: Apache-2.0
"""Layouts that fit: all of so many GPUs, the nearest to a configuration, and the fewest GPUs.

Tried are tensor x pipeline sizes with what is left for data parallelism, sequence parallelism on and off, no, selective
or as little other recomputation as fits, and micro-batch sizes in powers of two; the interleaved schedule is not. The
tensor size stays within a node. What `model.checks` refuses is left out. Every size is that of a model really built.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lora_megatron.config import Config
from lora_megatron.errors import ConfigError
from lora_megatron.methods.method import Method
from lora_megatron.model.checks import check_plan, layout_of
from lora_megatron.model.recomputation import CORE_ATTENTION
from lora_megatron.model.shape import ModelShape
from lora_megatron.planning.gpus import NODE, Gpu
from lora_megatron.planning.memory import MemoryPlan, Place, plan_rank
from lora_megatron.planning.plan import rank_weights
from lora_megatron.planning.recompute import SHARE, settle
from lora_megatron.planning.speed import Speed, estimate_speed
from lora_megatron.planning.weights import Weight

_MOST_GPUS = 4096
_RECOMPUTE = ("none", "selective", "auto")
_ALL_LAYERS = {"recompute_layers": None, "recompute_unit": 1}
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
class Problem:
    """A training to place on GPUs; what the search may change of `config` is `CHOICES`."""

    config: Config
    shape: ModelShape
    method: Method
    gpu: Gpu
    memory: float
    """Bytes of one GPU."""


@dataclass(frozen=True)
class _Grid:
    """What decides which model each rank holds, and how many replicas there are."""

    tensor: int
    pipeline: int
    data: int

    @property
    def model_size(self) -> int:
        return self.tensor * self.pipeline

    @property
    def world_size(self) -> int:
        return self.model_size * self.data


@dataclass(frozen=True)
class Candidate:
    """A layout that fits."""

    config: Config
    settled: Config
    """The same with `train.recompute = auto` made what fits."""
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


def search_layouts(problem: Problem, *, world_size: int) -> list[Candidate]:
    """Every layout of `world_size` GPUs that holds the training, the fastest first.

    Of layouts that differ in recomputation only, the one that recomputes least: the others are slower.
    """
    found = _fitting(problem, world_size, recompute=_RECOMPUTE)
    return sorted(found, key=lambda candidate: -candidate.speed.tokens_per_second)


def nearest_fit(problem: Problem, *, world_size: int) -> Candidate | None:
    """The layout that fits and changes the fewest settings, of these the fastest: on `world_size` GPUs, and if there
    is none, on the fewest that do. None if no size up to 4096 fits."""
    own = problem.config.train.recompute
    order = tuple(dict.fromkeys((own, *_RECOMPUTE)))
    found = list(_fitting(problem, world_size, recompute=order))
    if found:
        return min(found, key=lambda c: (len(c.changes(problem.config)), -c.speed.tokens_per_second))
    return fewest_gpus(problem)


def fewest_gpus(problem: Problem) -> Candidate | None:
    """The layout with the fewest GPUs that fits, without data parallelism; None if none of up to 4096 does."""
    layers = problem.shape.num_layers
    grids = [
        _Grid(tensor, pipeline, 1)
        for tensor in _sizes(NODE)
        for pipeline in range(1, min(layers, _MOST_GPUS // tensor) + 1)
        if layers % pipeline == 0
    ]
    for grid in sorted(grids, key=lambda grid: (grid.world_size, grid.pipeline)):
        if _weights_exceed(problem, grid):
            continue
        if found := list(_of_grid(problem, grid, recompute=_RECOMPUTE)):
            return max(found, key=lambda candidate: candidate.speed.tokens_per_second)
    return None


def _weights_exceed(problem: Problem, grid: _Grid) -> bool:
    """Whether the layers' matrices alone are too much for the ranks of `grid`: then nothing has to be built to know."""
    shape, config = problem.shape, problem.config
    layer = sum(math.prod(shape.projection(name)) for name in shape.projections)
    each = {"fp8": 1.0, "nf4": 0.5}.get(config.base.storage or "", 2 if config.train.precision == "bf16" else 4)
    return shape.num_layers * layer * each / grid.model_size > problem.memory


def _sizes(most: int) -> Iterator[int]:
    """1, 2, 4, ... up to `most`."""
    size = 1
    while size <= most:
        yield size
        size *= 2


def _fitting(problem: Problem, world_size: int, *, recompute: Sequence[str]) -> Iterator[Candidate]:
    layers = problem.shape.num_layers
    for tensor in range(1, min(NODE, world_size) + 1):
        for pipeline in range(1, min(layers, world_size // tensor) + 1):
            if world_size % (tensor * pipeline) == 0 and layers % pipeline == 0:
                yield from _of_grid(
                    problem, _Grid(tensor, pipeline, world_size // (tensor * pipeline)), recompute=recompute
                )


def _of_grid(problem: Problem, grid: _Grid, *, recompute: Sequence[str]) -> Iterator[Candidate]:
    """The layouts of `grid` that fit, each with the first choice of `recompute` that does."""
    built: dict[int, list[Weight]] = {}
    data = problem.config.data
    sizes = sorted({*_sizes(data.global_batch_size // grid.data), data.micro_batch_size})
    for sequence in (False, True) if grid.tensor > 1 else (False,):
        for size in sizes:
            layouts = [_with(problem.config, grid, sequence=sequence, recompute=r, samples=size) for r in recompute]
            if not _is_possible(problem, layouts[0], grid):
                continue
            fits = (fit for config in layouts if (fit := _if_it_fits(problem, config, grid, built)))
            if (first := next(fits, None)) is None:
                break  # a larger microbatch needs more
            yield first


def _with(config: Config, grid: _Grid, *, sequence: bool, recompute: str, samples: int) -> Config:
    modules = config.train.recompute_modules if recompute == config.train.recompute else CORE_ATTENTION
    cut = {
        "tensor": grid.tensor,
        "pipeline": grid.pipeline,
        "virtual_pipeline": 1,
        "context": 1,
        "sequence": sequence,
    }
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=cut),
            "train": config.train.model_copy(
                update={"recompute": recompute, "recompute_modules": modules, **_ALL_LAYERS}
            ),
            "data": config.data.model_copy(update={"micro_batch_size": samples}),
        }
    )


def _is_possible(problem: Problem, config: Config, grid: _Grid) -> bool:
    try:
        check_plan(config, problem.shape, problem.method, grid.world_size)
    except ConfigError:
        return False
    return True


def _if_it_fits(problem: Problem, config: Config, grid: _Grid, built: dict[int, list[Weight]]) -> Candidate | None:
    """The layout `config`, or None as soon as one stage does not fit.

    `built` keeps what the stages hold, which recomputation and microbatches do not change.
    """
    shape, method = problem.shape, problem.method

    def plans(of: Config, memory: float) -> list[MemoryPlan] | None:
        fitting = []
        for stage in range(grid.pipeline):
            if stage not in built:
                built[stage] = rank_weights(config, shape, method, stage)
            fitting.append(plan_rank(of, shape, method, built[stage], Place(stage, 0, grid.data)))
            if fitting[-1].total > memory:
                return None
        return fitting

    settled = settle(config, shape, method, lambda tried: plans(tried, SHARE * problem.memory) is not None)
    if (fitting := plans(settled, problem.memory)) is None:
        return None
    speed = estimate_speed(settled, shape, method, fitting, gpu=problem.gpu, world_size=grid.world_size)
    return Candidate(config, settled, grid.world_size, max(plan.total for plan in fitting), speed)

# SPDX-License-Identifier: Apache-2.0
"""`train.recompute = auto`: as few recomputed layers as the memory allows, found by the plan.

A recomputed layer keeps its input alone (Chen et al. 2016; megatron-core's method "block") and costs a second forward
pass. The first layers of a chunk are the ones to take: when their backward pass comes, the others' tensors are gone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from lora_megatron.config import Config
from lora_megatron.methods.method import Method
from lora_megatron.model.shape import ModelShape
from lora_megatron.parallel.agree import device_for_collectives
from lora_megatron.planning.memory import build_rank, chunk_layers, plan_rank, this_place

SHARE = 0.97
"""Of the memory that `auto` fills: the rest is for what the plan misses and for the allocator's fragments. Of the 139
GiB of an H200 that leaves 4."""


def settle(config: Config, shape: ModelShape, fits: Callable[[Config], bool]) -> Config:
    """`config` with `auto` made `none`, or `full` with the fewest layers that fit; all of them where none do.

    fits: asked about configurations that are settled; must hold for more layers if it holds for fewer. Where it is
    collective, so is this.
    """
    if config.train.recompute != "auto":
        return config
    low, high = 0, chunk_layers(config, shape)
    while low < high:
        middle = (low + high) // 2
        if fits(_with_layers(config, middle)):
            high = middle
        else:
            low = middle + 1
    return _with_layers(config, low)


def settle_here(config: Config, shape: ModelShape, method: Method, *, free: int | None) -> Config:
    """`settle` for the ranks of this job, the same on all of them; collective if there is something to settle.

    free: bytes that this rank can have; None, where nobody tells, recomputes nothing.
    """
    if config.train.recompute != "auto":
        return config
    weights, place = build_rank(config, shape, method), this_place()

    def fits(settled: Config) -> bool:
        needed = plan_rank(settled, shape, method, weights, place).allocated
        here = torch.tensor(int(free is None or needed <= SHARE * free), device=device_for_collectives())
        dist.all_reduce(here, dist.ReduceOp.MIN)
        return bool(here)

    return settle(config, shape, fits)


def describe(config: Config) -> str:
    """`none`, `selective`, `full`, or of how many layers of each chunk."""
    layers = config.train.recompute_layers
    return config.train.recompute if layers is None else f"full, {layers} a chunk"


def _with_layers(config: Config, layers: int) -> Config:
    chosen = {"recompute": "full", "recompute_layers": layers} if layers else {"recompute": "none"}
    return config.model_copy(update={"train": config.train.model_copy(update=chosen)})

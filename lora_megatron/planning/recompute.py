# SPDX-License-Identifier: Apache-2.0
"""`train.recompute = auto`: as few recomputed layers as the memory allows, found by the plan.

First of a frozen MLP the output of fc1 alone, the largest tensor that a layer keeps, for one product more: fewer FLOPs
for a byte than anything else (by count, for Llama 2 70B at 8192 tokens, 6.1 ms for a GB, a whole layer 8.4). Where even
all of these are not enough, whole layers: such a layer keeps its input alone (Chen et al. 2016; megatron-core's method
"block") and costs a second forward pass. There is no mixture of the two.

The first layers of a chunk are the ones to take: when their backward pass comes, the others' tensors are gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from lora_megatron.config import Config
from lora_megatron.methods.method import Method
from lora_megatron.model.recomputation import CORE_ATTENTION, MLP, has_frozen_mlp
from lora_megatron.model.shape import ModelShape
from lora_megatron.parallel.agree import device_for_collectives
from lora_megatron.planning.memory import build_rank, plan_rank, this_place
from lora_megatron.planning.stages import chunk_layers

SHARE = 0.97
"""Of the memory that `auto` fills: the rest is for what the plan misses and for the allocator's fragments. Of the 139
GiB of an H200 that leaves 4."""


def settle(config: Config, shape: ModelShape, method: Method, fits: Callable[[Config], bool]) -> Config:
    """`config` with `auto` made `none`, or `selective` of `[mlp]` in the fewest layers that fit, or `full` of the
    fewest; `full` of all of them where none do.

    fits: asked about configurations that are settled; of one kind it must hold for more layers if it holds for fewer.
        Where it is collective, so is this.
    """
    if config.train.recompute != "auto":
        return config
    layers = chunk_layers(config, shape)
    if has_frozen_mlp(shape, method) and fits(_with_mlps(config, layers)):
        return _fewest(config, _with_mlps, layers, fits)
    return _fewest(config, _with_layers, layers, fits)


def _fewest(
    config: Config, choose: Callable[[Config, int], Config], most: int, fits: Callable[[Config], bool]
) -> Config:
    """The first of choose(config, 0 .. most) that fits; the last of them is not asked about."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        if fits(choose(config, middle)):
            high = middle
        else:
            low = middle + 1
    return choose(config, low)


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

    return settle(config, shape, method, fits)


def describe(config: Config) -> str:
    """`none`, `selective` (of core attention), `selective of mlp`, `full`; and of how many layers of each chunk."""
    how, modules, layers = config.train.recompute, config.train.recompute_modules, config.train.recompute_layers
    parts = f" of {' and '.join(modules)}" if set(modules) != set(CORE_ATTENTION) else ""
    return f"{how}{parts}" if layers is None else f"{how}{parts}, {layers} a chunk"


def _with_mlps(config: Config, layers: int) -> Config:
    chosen = {"recompute": "selective", "recompute_modules": MLP, "recompute_layers": layers}
    return _with(config, chosen if layers else {"recompute": "none"})


def _with_layers(config: Config, layers: int) -> Config:
    chosen = {"recompute": "full", "recompute_layers": layers}
    return _with(config, chosen if layers else {"recompute": "none"})


def _with(config: Config, chosen: dict[str, Any]) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=chosen)})

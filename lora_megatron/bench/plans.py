# SPDX-License-Identifier: Apache-2.0
"""What the planner says of a case, in the kinds that are measured, and how much of the model fits this machine."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist

from lora_megatron.bench.measurement import Case
from lora_megatron.bench.results import Known
from lora_megatron.bench.workload import bench_config, method_of, slice_of
from lora_megatron.config import Config
from lora_megatron.model.shape import ModelShape
from lora_megatron.parallel.agree import device_for_collectives, gather_text
from lora_megatron.parallel.free_memory import free_for_this_rank
from lora_megatron.planning.flops import step_flops
from lora_megatron.planning.memory import MemoryPlan, plan_this_rank
from lora_megatron.planning.recompute import SHARE, describe, settle_here


def config_of(case: Case, config: Config, shape: ModelShape) -> Config:
    """How a case is run, with `train.recompute = auto` settled for this machine; `shape` is the whole model's.
    Collective."""
    config, shape = bench_config(config, case.method), slice_of(shape, case.layers)
    return settle_here(config, shape, method_of(config, shape), free=free_for_this_rank())


def plan_case(case: Case, config: Config, shape: ModelShape) -> MemoryPlan:
    """The plan of this rank; as `config_of`."""
    config, shape = config_of(case, config, shape), slice_of(shape, case.layers)
    return plan_this_rank(config, shape, method_of(config, shape))


def by_kind(plan: MemoryPlan) -> dict[str, int]:
    """The plan in the kinds of `measure.memory`: a CPU counts what autograd keeps, a GPU what its allocator held."""
    activations = plan.activations + plan.logits
    if torch.cuda.is_available():
        activations = plan.allocated - plan.persistent
    return {
        "weights": plan.weights,
        "trained": plan.trained_weights,
        "gradients": plan.gradients,
        "optimizer": plan.optimizer,
        "activations": activations,
        "peak": plan.persistent + activations,
    }


def fits(case: Case, config: Config, shape: ModelShape) -> bool:
    """Whether a case fits every rank's device by the plan, the same answer on all; collective."""
    available = free_for_this_rank()
    here = available is None or plan_case(case, config, shape).allocated <= SHARE * available
    everywhere = torch.tensor(int(here), device=device_for_collectives())
    dist.all_reduce(everywhere, dist.ReduceOp.MIN)
    return bool(everywhere)


def known_of(case: Case, config: Config, shape: ModelShape) -> Known:
    """Plan and FLOPs of a case, the same on every rank; collective."""
    config = config_of(case, config, shape)
    texts = gather_text(json.dumps(by_kind(plan_case(case, config, shape))))
    shape = slice_of(shape, case.layers)
    flops = step_flops(config, shape, method_of(config, shape))
    return Known([json.loads(text) for text in texts], flops.model, flops.hardware, describe(config))

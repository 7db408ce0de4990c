# SPDX-License-Identifier: Apache-2.0
"""A short training whose memory is counted, and the plan of the same rank."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from lora_megatron.config import parse_config
from lora_megatron.measure.memory import ActivationMeter, weight_bytes
from lora_megatron.methods.choose import choose_method
from lora_megatron.model.build import BuildOptions, build
from lora_megatron.model.checks import layout_of
from lora_megatron.model.initialise import initialise_base
from lora_megatron.model.presets import resolve_shape
from lora_megatron.model.storage import head_of, storage_of
from lora_megatron.parallel.groups import build_mesh
from lora_megatron.planning.memory import plan_this_rank
from lora_megatron.training.choose_optimizer import choose_optimizer
from lora_megatron.training.optimizer import gradient_bytes, wrap_ddp
from lora_megatron.training.step import run_microbatches
from tests.training.shared_stages import copying

VOCABULARY, LENGTH = 500, 64
Tree = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Sections of a configuration, over a tiny GPT of 4 layers that trains 8 samples of 64 tokens a step."""

    world: int = 1
    sections: Tree = field(default_factory=dict)

    def config(self) -> Any:
        tree: Tree = {
            "model": {"preset": "tiny", "num_layers": 4},
            "method": {"targets": {"q": 4, "v": 2}},
            "data": {"sequence_length": LENGTH, "micro_batch_size": 2, "global_batch_size": 8},
        }
        for name, keys in self.sections.items():
            tree[name] = {**tree.get(name, {}), **keys}
        return parse_config(tree)


def microbatch(samples: int, *, packing: bool) -> Tree:
    """Any tokens; only their number is of interest."""
    mask = None
    if packing:
        places = torch.arange(LENGTH)
        near = (places[:, None] // 16 == places[None, :] // 16) & (places[:, None] >= places[None, :])
        mask = (~near).expand(samples, 1, LENGTH, LENGTH)
    return {
        "tokens": torch.randint(0, VOCABULARY, (samples, LENGTH)),
        "labels": torch.randint(0, VOCABULARY, (samples, LENGTH)),
        "loss_mask": torch.ones(samples, LENGTH),
        "position_ids": torch.arange(LENGTH).expand(samples, LENGTH),
        "attention_mask": mask,
        "first_sample": 0,
    }


def measure_and_plan(cases: list[Case]) -> list[tuple[Tree, Tree]]:
    """(measured bytes, the plan's) of this rank, case by case; the cases share one mesh."""
    return [_one(case) for case in cases]


def _one(case: Case) -> tuple[Tree, Tree]:
    config = case.config()
    if not mpu.is_initialized():
        build_mesh(layout_of(config), seed=1, timeout_minutes=5)
    shape = resolve_shape(config.model, tokenizer_vocab_size=VOCABULARY)
    method = choose_method(config.method, num_layers=shape.num_layers)
    train = config.train
    options = BuildOptions(
        train.precision,
        train.recompute,
        config.method.dropout,
        adapter_seed=1,
        storage=storage_of(config),
        head=head_of(config),
        recompute_modules=train.recompute_modules,
        recompute_layers=train.recompute_layers,
        recompute_unit=train.recompute_unit,
        attention=train.attention,
        pp_comm_copy=config.parallel.pp_comm_copy,
    )
    chunks = build(shape, method, layout_of(config), options)
    initialise_base(chunks, seed=3, num_layers=shape.num_layers)
    ddp = wrap_ddp(chunks, sharding=config.optimizer.sharding, precision=train.precision)
    optimizer = choose_optimizer(ddp, config.optimizer, precision=train.precision)
    meter = ActivationMeter(chunks)
    data = config.data
    count = data.global_batch_size // (data.micro_batch_size * mpu.get_data_parallel_world_size())
    batches = [microbatch(data.micro_batch_size, packing=data.packing) for _ in range(count)]
    optimizer.zero_grad()
    with copying(), meter:
        loss = run_microbatches(ddp, batches)
    optimizer.step(loss.tokens)
    measured = {
        "weights": weight_bytes(chunks),
        "gradients": gradient_bytes(ddp),
        "optimizer": optimizer.state_bytes(),
        "activations": meter.peak_bytes,
        "rank": dist.get_rank(),
    }
    plan = plan_this_rank(config, shape, method)
    return measured, {**asdict(plan), "weights": plan.weights}

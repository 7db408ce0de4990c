# SPDX-License-Identifier: Apache-2.0
"""The plan of a whole training: every distinct rank's memory, for the method and for full fine-tuning beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from lora_megatron.checkpoint.adapter import describe_method
from lora_megatron.config import Config
from lora_megatron.methods.baselines import Full
from lora_megatron.methods.method import Method
from lora_megatron.model.build import DTYPES
from lora_megatron.model.checks import check_plan, layout_of
from lora_megatron.model.names import adapter_key
from lora_megatron.model.recomputation import without_mlp
from lora_megatron.model.shape import ModelShape
from lora_megatron.parallel.fake_world import fake_world
from lora_megatron.parallel.groups import Layout
from lora_megatron.planning.flops import Flops, token_flops
from lora_megatron.planning.gpus import Gpu
from lora_megatron.planning.memory import MemoryPlan, Place, build_rank, plan_rank
from lora_megatron.planning.recompute import SHARE, settle
from lora_megatron.planning.speed import Speed, estimate_speed
from lora_megatron.planning.stages import microbatch_of, names_read_backward
from lora_megatron.planning.transposes import host_bytes
from lora_megatron.planning.weights import Weight, as_fully_trained
from lora_megatron.strict_safetensors.header import make_header

MEMORY_KINDS = tuple(field.name for field in fields(MemoryPlan))
_STATE_BYTES = 12  # fp32 master copy and two moments of each trained element
_FINGERPRINT = "0" * 32  # stands for that of a base nobody has read


@dataclass(frozen=True)
class RankPlan:
    """The ranks of one pipeline stage: they need the same bytes."""

    stage: int
    layers: tuple[range, ...]
    """Global layer indices, a range for each model chunk."""
    count: int
    """How many ranks of the job these are: tensor x data parallel."""
    parameters: int
    """Elements this rank holds, vocabulary padding and the copy of a tied embedding included."""
    trainable_parameters: int
    saved_bytes: int
    """What this rank holds of the tensors one has to keep."""
    memory: MemoryPlan
    host_bytes: int
    """Locked in the host's memory (`base.transposes` host)."""


@dataclass(frozen=True)
class MethodPlan:
    """What one method needs on a layout."""

    method: str
    parameters: int
    """Of the true model with its adapters; a tied embedding once, no padding."""
    trainable_parameters: int
    saved_bytes: int
    """Tensors one has to keep for the task: the adapter, or all weights where the method trains the base."""
    saved_file_bytes: int
    """The same with the header of the file; of a whole model, with one file's."""
    checkpoint_bytes: int
    """A training checkpoint: fp32 masters and moments, and the adapter."""
    ranks: tuple[RankPlan, ...]
    flops: Flops
    """Per token."""

    @property
    def largest(self) -> RankPlan:
        """The rank that needs most."""
        return max(self.ranks, key=lambda rank: rank.memory.total)

    @property
    def total_memory(self) -> dict[str, int]:
        """Bytes over all ranks by kind, and `total`."""
        names = (*MEMORY_KINDS, "total")
        return {name: sum(rank.count * getattr(rank.memory, name) for rank in self.ranks) for name in names}

    @property
    def host_bytes(self) -> int:
        """Locked in the memory of all hosts together."""
        return sum(rank.count * rank.host_bytes for rank in self.ranks)

    def fits(self, memory: float) -> bool:
        """Whether every rank fits into a GPU of `memory` bytes."""
        return self.largest.memory.total <= memory


@dataclass(frozen=True)
class Plan:
    """A training on `world_size` GPUs, and full fine-tuning of the same model on the same layout."""

    config: Config
    """With recomputation settled; `full_config` likewise, of full fine-tuning."""
    full_config: Config
    shape: ModelShape
    world_size: int
    chosen: MethodPlan
    full: MethodPlan
    chosen_method: Method

    @property
    def layout(self) -> Layout:
        return layout_of(self.config)

    @property
    def data_size(self) -> int:
        """Data-parallel replicas."""
        return self.world_size // self.layout.model_size

    def speed(self, gpu: Gpu) -> Speed:
        """The estimate for the chosen method."""
        memory = [rank.memory for rank in self.chosen.ranks]
        return estimate_speed(self.config, self.shape, self.chosen_method, memory, gpu=gpu, world_size=self.world_size)

    def full_speed(self, gpu: Gpu) -> Speed:
        """The estimate for full fine-tuning."""
        memory = [rank.memory for rank in self.full.ranks]
        return estimate_speed(self.full_config, self.shape, Full(), memory, gpu=gpu, world_size=self.world_size)


def full_config(config: Config) -> Config:
    """The same run as full fine-tuning, for which weights are neither frozen nor packed, nor MLPs rebuilt as frozen."""
    method = config.method.model_copy(update={"name": "full", "dropout": 0.0})
    return without_mlp(config.model_copy(update={"base": config.base.of_training_precision(), "method": method}))


def plan_training(
    config: Config, shape: ModelShape, method: Method, *, world_size: int, memory: float = math.inf
) -> Plan:
    """Plan `config` on `world_size` GPUs. The process must not be in a world: it stands in for each rank in turn.

    memory: bytes of one GPU, up to which `train.recompute = auto` fills it, of either method.

    Raises:
        ConfigError: see `model.checks.check_plan`.
    """
    check_plan(config, shape, method, world_size)
    asked = config
    stages = stage_weights(config, shape, method)
    data_size = world_size // layout_of(config).model_size
    whole = [as_fully_trained(weights) for weights in stages]
    chosen, config = _settled(config, shape, method, stages, data_size=data_size, memory=memory)
    full, full_settled = _settled(full_config(asked), shape, Full(), whole, data_size=data_size, memory=memory)
    return Plan(config, full_settled, shape, world_size, chosen, full, method)


def _settled(
    config: Config,
    shape: ModelShape,
    method: Method,
    stages: Sequence[Sequence[Weight]],
    *,
    data_size: int,
    memory: float,
) -> tuple[MethodPlan, Config]:
    """The plan with recomputation settled, and the configuration that it is of."""

    def plan(settled: Config) -> MethodPlan:
        return plan_method(settled, shape, method, stages, data_size=data_size)

    settled = settle(config, shape, method, lambda tried: plan(tried).fits(SHARE * memory))
    return plan(settled), settled


def stage_weights(config: Config, shape: ModelShape, method: Method) -> list[list[Weight]]:
    """What the ranks of each pipeline stage hold, read off their real models.

    The first and the last tensor rank are built: cuts are equal, and were they not, these two would show it.
    """
    last = config.parallel.tensor - 1
    stages = []
    for stage in range(config.parallel.pipeline):
        weights = rank_weights(config, shape, method, stage)
        assert not last or rank_weights(config, shape, method, stage, tensor_rank=last) == weights, "unequal cuts"
        stages.append(weights)
    return stages


def rank_weights(
    config: Config, shape: ModelShape, method: Method, stage: int, *, tensor_rank: int = 0
) -> list[Weight]:
    """What one rank holds, read off its real model."""
    with fake_world(layout_of(config), stage=stage, tensor_rank=tensor_rank):
        return build_rank(config, shape, method)


def plan_method(
    config: Config, shape: ModelShape, method: Method, stages: Sequence[Sequence[Weight]], *, data_size: int
) -> MethodPlan:
    """Plan a method whose ranks hold `stages`. Of data-parallel ranks that differ in padding the largest counts."""
    layout, batch = layout_of(config), microbatch_of(config, shape)
    data_ranks = range(data_size if config.optimizer.sharding == "megatron" else 1)
    chunk = shape.num_layers // (layout.pipeline * layout.virtual_pipeline)
    ranks = []
    for stage, weights in enumerate(stages):
        plans = [plan_rank(config, shape, method, weights, Place(stage, rank, data_size)) for rank in data_ranks]
        starts = [(index * layout.pipeline + stage) * chunk for index in range(layout.virtual_pipeline)]
        layers = tuple(range(start, start + chunk) for start in starts)
        held = [weight for weight in weights if weight.full_shape is not None]
        trained = sum(weight.size for weight in held if weight.trained)
        ranks.append(
            RankPlan(
                stage,
                layers,
                layout.tensor * data_size,
                sum(weight.size for weight in held),
                trained,
                sum(w.size * w.itemsize for w in held if w.trained or method.trains_base),
                max(plans, key=lambda plan: plan.total),
                host_bytes(weights, config.base, read_backward=names_read_backward(method, batch, stage)),
            )
        )
    true = [w for weights in stages for w in weights if w.full_shape is not None and not w.is_copy]
    trained_size = sum(weight.full_size for weight in true if weight.trained)
    kept = [weight for weight in true if weight.trained or method.trains_base]
    payload = sum(weight.full_size * weight.itemsize for weight in kept)
    return MethodPlan(
        method.name,
        sum(weight.full_size for weight in true),
        trained_size,
        payload,
        payload + _header_bytes(config, shape, method, kept),
        _STATE_BYTES * trained_size + (0 if method.trains_base else payload),
        tuple(ranks),
        token_flops(config, shape, method),
    )


def _header_bytes(config: Config, shape: ModelShape, method: Method, kept: Sequence[Weight]) -> int:
    """Of the safetensors file with these tensors, as `checkpoint.adapter` writes it."""
    dtype: torch.dtype = DTYPES[config.train.precision]
    keys = {adapter_key(w.name, gated=shape.gated_mlp): w.full_shape or () for w in kept}
    facts = {
        "base": config.base.weights,
        "base_fingerprint": _FINGERPRINT,
        "seed": config.train.seed,
        **describe_method(method, shape),
    }
    metadata = {"format": "pt"} if method.trains_base else {"format": "pt", "lora_megatron": json.dumps(facts)}
    return len(make_header([(name, dtype, keys[name]) for name in sorted(keys)], metadata))

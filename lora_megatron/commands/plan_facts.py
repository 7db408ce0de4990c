# SPDX-License-Identifier: Apache-2.0
"""A plan in plain values, for `lora-megatron plan --json`. Sizes are bytes, speeds are estimates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lora_megatron.planning.gpus import Gpu
from lora_megatron.planning.plan import MEMORY_KINDS, MethodPlan, Plan, RankPlan
from lora_megatron.planning.search import Candidate
from lora_megatron.planning.speed import EFFICIENCY, LINK_EFFICIENCY, Speed
from lora_megatron.planning.weights import STORAGE

Facts = dict[str, Any]


def facts_of(plan: Plan, gpu: Gpu, memory: float, *, nearest: Candidate | None, ranking: Sequence[Candidate]) -> Facts:
    """Everything the tables show, and the same per distinct rank in `ranks`."""
    config = plan.config
    speed, full_speed = plan.speed(gpu), plan.full_speed(gpu)
    chosen, full = _method_facts(plan.chosen, speed, memory), _method_facts(plan.full, full_speed, memory)
    return {
        "method": plan.chosen.method,
        "layout": {
            **config.parallel.model_dump(exclude={"timeout_minutes"}),
            "data": plan.data_size,
            "world_size": plan.world_size,
            "micro_batch_size": config.data.micro_batch_size,
            "global_batch_size": config.data.global_batch_size,
            "sequence_length": config.data.sequence_length,
            "recompute": config.train.recompute,
            "recompute_modules": config.train.recompute_modules,
            "recompute_layers": config.train.recompute_layers,
            "precision": config.train.precision,
            "storage": config.base.storage or config.train.precision,
            "storage_format": STORAGE.get(config.base.storage or "", "as train.precision"),
            "head": config.base.head or config.train.precision,
            "sharding": config.optimizer.sharding,
        },
        "gpu": {**asdict(gpu), "memory_bytes": round(memory)},
        **chosen,
        "estimate": {"efficiency": EFFICIENCY, "link_efficiency": LINK_EFFICIENCY},
        "nearest_fit": None if nearest is None else _candidate_facts(nearest, plan),
        "full_fine_tuning": full,
        "ratios": {
            "trainable_parameters": _ratio(plan.chosen.trainable_parameters, plan.full.trainable_parameters),
            "memory": _ratio(chosen["totals"]["memory"]["total"], full["totals"]["memory"]["total"]),
            "saved_bytes": _ratio(plan.chosen.saved_bytes, plan.full.saved_bytes),
            "tokens_per_second": _ratio(speed.tokens_per_second, full_speed.tokens_per_second),
        },
        "ranking": [_candidate_facts(candidate, plan) for candidate in ranking],
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole


def _method_facts(method: MethodPlan, speed: Speed, memory: float) -> Facts:
    return {
        "totals": {
            "parameters": method.parameters,
            "trainable_parameters": method.trainable_parameters,
            "adapter_bytes": method.saved_bytes,
            "adapter_file_bytes": method.saved_file_bytes,
            "checkpoint_bytes": method.checkpoint_bytes,
            "memory": method.total_memory,
            "host_bytes": method.host_bytes,
        },
        "ranks": [_rank_facts(rank) for rank in method.ranks],
        "flops": {
            "model_per_token": method.flops.model,
            "hardware_per_token": method.flops.hardware,
        },
        "speed": asdict(speed),
        "fits": method.fits(memory),
    }


def _rank_facts(rank: RankPlan) -> Facts:
    kinds = (*MEMORY_KINDS, "weights", "persistent", "allocated", "total")
    return {
        "pipeline_stage": rank.stage,
        "layers": [index for layers in rank.layers for index in layers],
        "count": rank.count,
        "parameters": rank.parameters,
        "trainable_parameters": rank.trainable_parameters,
        "adapter_bytes": rank.saved_bytes,
        "host_bytes": rank.host_bytes,
        "memory": {kind: getattr(rank.memory, kind) for kind in kinds},
    }


def _candidate_facts(candidate: Candidate, plan: Plan) -> Facts:
    parallel = candidate.config.parallel
    return {
        "world_size": candidate.world_size,
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "data": candidate.data_size,
        "sequence": parallel.sequence,
        "recompute": candidate.settled.train.recompute,
        "recompute_modules": candidate.settled.train.recompute_modules,
        "recompute_layers": candidate.settled.train.recompute_layers,
        "micro_batch_size": candidate.config.data.micro_batch_size,
        "needed_bytes": candidate.needed,
        "speed": asdict(candidate.speed),
        "changes": candidate.changes(plan.config),
    }

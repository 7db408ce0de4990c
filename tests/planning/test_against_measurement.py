# SPDX-License-Identifier: Apache-2.0
"""The plan of a rank against the same rank's training on a CPU: exact for what exists all the time, and activations
within 0.2% of what autograd holds at the worst moment of a step."""

from __future__ import annotations

from typing import Any

import pytest

from tests.planning.measured import Case, Tree, measure_and_plan
from tests.pool import Pool

BF16: Tree = {"train": {"precision": "bf16"}}
LLAMA: Tree = {"model": {"preset": "tiny-llama", "num_layers": 4}}
EVERY_TARGET: Tree = {"method": {"targets": {"q": 4, "k": 1, "v": 2, "o": 3, "fc1": 2, "fc2": 5}}}
FULL: Tree = {"method": {"name": "full"}}
TOLERANCE = 0.002


def case(*parts: Tree, world: int = 1, **parallel: Any) -> Case:
    """Sections laid over each other, key by key."""
    sections: Tree = {"parallel": parallel}
    for part in parts:
        for name, keys in part.items():
            sections[name] = {**sections.get(name, {}), **keys}
    return Case(world, sections)


def recompute(choice: str) -> Tree:
    return {"train": {"recompute": choice}}


def mlp(layers: int | None = None, *modules: str) -> Tree:
    """fc1's output recomputed, and what else `modules` name."""
    return {"train": {"recompute": "selective", "recompute_modules": [*modules, "mlp"], "recompute_layers": layers}}


def sharding(kind: str) -> Tree:
    return {"optimizer": {"sharding": kind}, "data": {"global_batch_size": 12}}


def model(**fields: Any) -> Tree:
    return {"model": fields}


def tensor(*parts: Tree, sequence: bool = True) -> Case:
    return case(*parts, world=2, tensor=2, sequence=sequence)


def pipeline(*parts: Tree, stages: int = 2, **parallel: Any) -> Case:
    return case(*parts, world=stages, pipeline=stages, **parallel)


HEAD: Tree = {"base": {"head": "fp8"}}
# Cases of one group run in one world, on one mesh, which takes longer to build than a case takes.
GROUPS = {
    "methods": [
        case(),
        case(BF16),
        case(EVERY_TARGET, BF16),
        case(FULL, BF16),
        case({"method": {"name": "bitfit"}}),
        case({"method": {"name": "ft_top2"}}),
        case(EVERY_TARGET, {"method": {"dropout": 0.1}}),
        case({"method": {"layers": {"0-1": {"q": 0, "v": 0}}}}),
    ],
    "recomputation": [
        case(recompute("selective")),
        case(recompute("full")),
        case(EVERY_TARGET, BF16, recompute("selective")),
        case(EVERY_TARGET, BF16, recompute("full")),
        case(FULL, recompute("full")),
        case({"train": {"recompute": "full", "recompute_layers": 1}}),
        case(EVERY_TARGET, BF16, {"train": {"recompute": "full", "recompute_layers": 3}}),
        case(LLAMA, EVERY_TARGET, BF16, recompute("full")),
        case(EVERY_TARGET, BF16, {"train": {"recompute": "full", "recompute_unit": 2}}),
        case({"train": {"recompute": "full", "recompute_unit": 4}}),
    ],
    "recomputed MLPs": [
        case(mlp()),
        case(EVERY_TARGET, BF16, mlp(1)),
        case(EVERY_TARGET, BF16, mlp(3, "core_attn")),
        case(LLAMA, EVERY_TARGET, BF16, mlp(2)),
        case(LLAMA, mlp(None, "core_attn")),
        case({"method": {"targets": {"fc2": 3}}}, mlp()),  # layer 0 keeps the norm's input for it
        case({"method": {"targets": {"fc2": 3}}}, mlp(), model(parallel_residual=True)),
        case({"method": {"layers": {"0-1": {"q": 0, "v": 0}}}}, mlp(3)),
        case({"method": {"name": "ft_top2"}}, mlp()),
        case(LLAMA, EVERY_TARGET, BF16, mlp(), {"base": {"storage": "fp8"}}),
        case(EVERY_TARGET, mlp(2), {"base": {"storage": "nf4"}}),
    ],
    "architectures": [
        case(LLAMA),
        case(LLAMA, EVERY_TARGET, BF16),
        case(LLAMA, FULL, BF16),
        case(LLAMA, BF16, model(qk_norm=True)),
        case(LLAMA, FULL, model(qk_norm=True)),
        case(LLAMA, EVERY_TARGET, BF16, model(parallel_residual=True)),
        case(LLAMA, model(sliding_window=16)),
        case(EVERY_TARGET, model(parallel_residual=True)),
        case(EVERY_TARGET, model(activation="relu")),
        case(model(num_query_groups=2), {"data": {"packing": True}}),
    ],
    "output layers in FP8, one rank": [
        case(BF16, HEAD),
        case(LLAMA, BF16, HEAD, model(tied_embeddings=False)),
        case(EVERY_TARGET, {"base": {"head": "fp8", "storage": "fp8"}}),
    ],
    "output layers in FP8, two ranks": [tensor(BF16, HEAD), tensor(LLAMA, HEAD, model(tied_embeddings=False))],
    "output layers in FP8, two stages": [pipeline(BF16, HEAD), pipeline(LLAMA, HEAD, model(tied_embeddings=False))],
    "sharded optimizers, one rank": [case(FULL, BF16, sharding("megatron")), case(sharding("deepspeed"))],
    "data parallel": [
        case(BF16, world=3),
        case(EVERY_TARGET, BF16, sharding("megatron"), world=3),
        case(FULL, sharding("megatron"), world=3),
        case(EVERY_TARGET, BF16, sharding("deepspeed"), world=3),
        case(FULL, sharding("deepspeed"), world=3),
    ],
    "tensor parallel": [
        tensor(EVERY_TARGET, BF16, sequence=False),
        tensor(EVERY_TARGET, BF16),
        tensor(FULL),
        tensor(LLAMA, EVERY_TARGET, BF16),
        tensor(recompute("full")),
        tensor({"method": {"dropout": 0.1}}, EVERY_TARGET),
        tensor(LLAMA, EVERY_TARGET, BF16, mlp(3)),
        tensor({"method": {"targets": {"fc2": 3}}}, mlp(), sequence=False),
    ],
    "pipeline": [pipeline(), pipeline(recompute("full")), pipeline(FULL, sharding("megatron")), pipeline(mlp(1))],
    "interleaved": [
        pipeline(BF16, virtual_pipeline=2),
        pipeline(recompute("full"), virtual_pipeline=2),
        pipeline({"train": {"recompute": "full", "recompute_layers": 1}}, virtual_pipeline=2),
        pipeline(EVERY_TARGET, mlp(1), virtual_pipeline=2),
        pipeline(BF16, virtual_pipeline=2, pp_comm_copy=True),
    ],
    "four stages": [pipeline(stages=4)],
    "tensor and pipeline": [case(LLAMA, BF16, world=4, tensor=2, pipeline=2, sequence=True)],
}


@pytest.mark.parametrize("group", GROUPS)
def test_the_plan_is_what_a_training_takes(pool: Pool, group: str) -> None:
    cases = GROUPS[group]
    for rank, pairs in enumerate(pool.run(cases[0].world, measure_and_plan, cases=cases)):
        for one, (measured, planned) in zip(cases, pairs, strict=True):
            where = f"rank {rank} of {one.sections}"
            for kind in ("weights", "gradients", "optimizer"):
                assert planned[kind] == measured[kind] > 0, f"{kind} on {where}"
            kept = planned["activations"] + planned["logits"]
            assert kept == pytest.approx(measured["activations"], rel=TOLERANCE), where


def test_the_comparison_can_fail(pool: Pool) -> None:
    """Another recomputation, adapter or precision is far outside the tolerance."""
    cases = [case(), case(recompute("full")), case(BF16), case(EVERY_TARGET)]
    pairs = pool.run(1, measure_and_plan, cases=cases)[0]
    planned = [plan["activations"] + plan["logits"] for _, plan in pairs]
    for index, (measured, _) in enumerate(pairs):
        for other, kept in enumerate(planned):
            if other != index:
                assert kept != pytest.approx(measured["activations"], rel=2 * TOLERANCE)

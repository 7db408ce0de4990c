# SPDX-License-Identifier: Apache-2.0
"""Optimizer state sharded over data-parallel ranks gives the parameters that unsharded state gives, and is smaller."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from lora_megatron.parallel.groups import Layout
from tests.comparison import compare
from tests.pool import Pool
from tests.twin import Experiment, Record, train_twins

SHARDINGS = (
    "megatron",
    pytest.param(
        "deepspeed",
        marks=pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
    ),
)
EVERY = ("none", *(["deepspeed"] if importlib.util.find_spec("deepspeed") else []), "megatron")
LAYOUTS = {"tp2-dp2": Layout(tensor=2, sequence=True), "pp2-dp2": Layout(pipeline=2)}
METHODS = {"lora": {"targets": {"q": 4, "v": 2, "o": 3}}, "ft_top2": {"name": "ft_top2"}}
LAYERS = {"lora": 2, "ft_top2": 4}  # ft_top2 leaves the first of two pipeline stages without anything to train
CASES = [  # layout, method, precision
    *((layout, "lora", precision) for layout in LAYOUTS for precision in ("fp32", "bf16")),
    ("pp2-dp2", "ft_top2", "fp32"),
]
Key = tuple[str, str, str, int]

_records: dict[str, dict[Key, Record]] = {}


def experiment_of(key: Key) -> Experiment:
    """Method, precision, sharding and the step before which state moves into a fresh model and optimizer."""
    method, precision, sharding, resume_at = key
    optimizer = {**Experiment().optimizer, "sharding": sharding}
    model = {"preset": "tiny", "num_layers": LAYERS[method]}
    return Experiment(
        model=model, method=METHODS[method], precision=precision, optimizer=optimizer, resume_at=resume_at
    )


def records(pool: Pool, layout: str) -> dict[Key, Record]:
    """Every combination on a layout of four ranks, run once."""
    if layout not in _records:
        cases = [(method, precision) for name, method, precision in CASES if name == layout]
        keys = [(*case, sharding, resume_at) for case in cases for sharding in EVERY for resume_at in (0, 2)]
        experiments = [replace(experiment_of(key), layout=LAYOUTS[layout]) for key in keys]
        _records[layout] = dict(zip(keys, pool.run(4, train_twins, experiments=experiments)[0], strict=True))
    return _records[layout]


@pytest.mark.parametrize(("layout", "method", "precision"), CASES)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_sharded_state_gives_the_same_parameters(
    pool: Pool, sharding: str, method: str, precision: str, layout: str
) -> None:
    """The sums are the same; only Adam's arithmetic may be fused otherwise, some ulps of an fp32 master per step. In
    bf16 such an ulp can turn the rounding of a parameter, one part in 2^8.
    """
    runs = records(pool, layout)
    got, want = runs[method, precision, sharding, 0], runs[method, precision, "none", 0]
    assert compare(got, want, tolerance=1e-5 if precision == "fp32" else 2**-8) > 30


@pytest.mark.parametrize(("layout", "method", "precision"), CASES)
@pytest.mark.parametrize("sharding", ["none", *SHARDINGS])
def test_moved_state_continues_bit_for_bit(pool: Pool, sharding: str, method: str, precision: str, layout: str) -> None:
    runs = records(pool, layout)
    straight, resumed = runs[method, precision, sharding, 0], runs[method, precision, sharding, 2]
    assert resumed["loss"] == straight["loss"]
    assert resumed["norm"] == straight["norm"]
    for name, value in straight["values"][2].items():
        assert torch.equal(resumed["values"][2][name], value), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_state_is_halved_by_two_data_parallel_ranks(pool: Pool, sharding: str, layout: str) -> None:
    runs = records(pool, layout)
    for precision in ("fp32", "bf16"):
        sharded, whole = (runs["lora", precision, kind, 0]["state_bytes"] for kind in (sharding, "none"))
        # fp32 parameters are their own masters unless DeepSpeed keeps flat ones; bf16 has a master and two moments.
        copies = 3 if precision == "bf16" or sharding == "deepspeed" else 2
        for (state, trained), (whole_state, _) in zip(sharded, whole, strict=True):
            assert whole_state == (3 if precision == "bf16" else 2) * trained
            assert 0 < state < 0.75 * copies * trained
        # Data-parallel pairs together hold everything; padding of the flat buffers is at most a few hundred numbers.
        total, wanted = sum(state for state, _ in sharded), copies * sum(trained for _, trained in sharded) / 2
        assert wanted <= total <= wanted + 4 * copies * 4 * 256


def test_a_stage_that_trains_nothing_holds_no_state(pool: Pool) -> None:
    for sharding in EVERY:
        state = records(pool, "pp2-dp2")["ft_top2", "fp32", sharding, 0]["state_bytes"]
        assert state[:2] == [(0, 0), (0, 0)]
        assert all(size > 0 for size, _ in state[2:])

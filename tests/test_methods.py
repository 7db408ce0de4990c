# SPDX-License-Identifier: Apache-2.0
"""The methods that train parts of the base equal their unsharded twins, and train what they say and nothing else."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state as mpu

from lora_megatron.model.names import named_parameters
from lora_megatron.parallel.groups import Layout, build_mesh
from lora_megatron.training.step import run_microbatches
from tests.comparison import compare
from tests.pool import Pool
from tests.twin import Experiment, Record, Run, own_batches, train_twins

GPT = Experiment(steps=2)
LLAMA = replace(GPT, model={"preset": "tiny-llama", "num_layers": 4})
EXPERIMENTS: dict[str, Experiment] = {
    "full": replace(GPT, method={"name": "full"}),
    "full-llama": replace(LLAMA, method={"name": "full"}),
    "full-recompute": replace(GPT, method={"name": "full"}, recompute="full"),
    "bitfit": replace(GPT, method={"name": "bitfit"}),
    "bitfit-recompute": replace(GPT, method={"name": "bitfit"}, recompute="full"),
    "ft_top2": replace(GPT, method={"name": "ft_top2"}),
    "ft_top2-llama": replace(LLAMA, method={"name": "ft_top2"}),
}
# pp2: the tied embedding sits on both stages, and ft_top2 leaves the first stage nothing to train.
LAYOUTS = {
    "one": (1, Layout()),
    "tp2": (2, Layout(tensor=2)),
    "tp2-sp": (2, Layout(tensor=2, sequence=True)),
    "pp2": (2, Layout(pipeline=2)),
    "vpp2": (2, Layout(pipeline=2, virtual_pipeline=2)),
    "tp2-sp-pp2": (4, Layout(tensor=2, pipeline=2, sequence=True)),
    "pp2-dp2": (4, Layout(pipeline=2)),
}
# A part of tp2-sp-pp2; and in `test_oracle` whole models train on it in every run.
SP = pytest.param("tp2-sp", marks=pytest.mark.slow)
CUT = ["tp2", SP, "pp2", "vpp2", "tp2-sp-pp2", "pp2-dp2"]

_records: dict[str, dict[str, Record]] = {}


def records(pool: Pool, name: str) -> dict[str, Record]:
    """Every experiment on a layout, run once."""
    if name not in _records:
        world, layout = LAYOUTS[name]
        experiments = [replace(experiment, layout=layout) for experiment in EXPERIMENTS.values()]
        ran = pool.run(world, train_twins, experiments=experiments)[0]
        _records[name] = dict(zip(EXPERIMENTS, ran, strict=True))
    return _records[name]


@pytest.mark.parametrize("layout", CUT)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_method_equals_unsharded(pool: Pool, experiment: str, layout: str) -> None:
    whole = records(pool, "one")[experiment.removesuffix("-recompute")]
    assert compare(records(pool, layout)[experiment], whole) >= 30


def parts_of(names: Any) -> set[str]:
    """Parameter names without the layer's number."""
    return {".".join(part for part in name.split(".") if not part.isdecimal()) for name in names}


def test_each_method_trains_what_it_says(pool: Pool) -> None:
    one = records(pool, "one")
    linears = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    modules = [f"decoder.layers.{m}" for m in (*linears, "input_layernorm", "pre_mlp_layernorm")]
    biases = {f"{module}.bias" for module in modules}
    assert parts_of(one["bitfit"]["born"]) == {*biases, "decoder.final_layernorm.bias"}
    top = one["ft_top2"]["born"]
    assert parts_of(top) == biases | {f"{module}.weight" for module in modules}
    assert {name.split(".")[2] for name in top} == {"2", "3"}
    embeddings = {"embedding.word_embeddings.weight", "embedding.position_embeddings.weight"}
    assert embeddings < set(one["full"]["born"])
    assert set(one["bitfit"]["born"]) < set(one["full"]["born"])


def test_every_trained_tensor_moves(pool: Pool) -> None:
    for record in records(pool, "one").values():
        still = [n for n, v in record["values"][1].items() if torch.equal(v, record["values"][0][n])]
        assert still == []


@pytest.mark.parametrize("layout", ["one", *CUT])
def test_the_gradient_norm_counts_every_parameter_once(pool: Pool, layout: str) -> None:
    """Norms of whole, distinct tensors: replicas over TP and the copy of a tied embedding add nothing."""
    for record in records(pool, layout).values():
        gradients = {n: g for n, g in record["grads"][0].items() if not n.endswith("(copy)")}
        total = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))
        assert record["norm"][0] == pytest.approx(total, rel=1e-5)


def test_a_tied_embedding_has_one_copy_per_end_of_the_pipeline(pool: Pool) -> None:
    name = "embedding.word_embeddings.weight"
    record = records(pool, "pp2")["full"]
    for kind in ("grads", "values"):
        assert torch.equal(record[kind][1][name], record[kind][1][f"{name} (copy)"])
    assert f"{name} (copy)" not in records(pool, "pp2")["full-llama"]["values"][1]


def test_frozen_parameters_cost_no_optimizer_state(pool: Pool) -> None:
    """Two moments per trained number in fp32, and nothing on a stage that trains nothing."""
    for layout in ("one", "pp2"):
        for record in records(pool, layout).values():
            assert [state for state, _ in record["state_bytes"]] == [2 * size for _, size in record["state_bytes"]]
    assert records(pool, "pp2")["ft_top2"]["state_bytes"][0] == (0, 0)


def frozen_after_a_step(experiment: Experiment) -> list[str]:
    """One step by hand: which frozen parameters have changed, hold a gradient or have a place in the optimizer."""
    build_mesh(experiment.layout, seed=1, timeout_minutes=2)
    run = Run(experiment)
    frozen = {n.name: n.parameter for n in named_parameters(run.chunks) if not n.parameter.requires_grad}
    before = {name: parameter.clone() for name, parameter in frozen.items()}
    loss = run_microbatches(run.ddp, own_batches(experiment, 0))
    assert run.optimizer.step(loss.tokens) > 0
    stepped = {id(p) for group in run.optimizer.inner.param_groups for p in group["params"]}
    buffered = sum(b.grad_data.numel() for ddp in run.ddp for b in ddp.buffers)
    trained = sum(p.numel() for p in run.names)
    assert trained <= buffered <= trained + 128 * max(1, len(run.names)), "gradient buffers of the trained only"
    touched = [name for name, parameter in frozen.items() if not torch.equal(parameter, before[name])]
    touched += [n for n, p in frozen.items() if p.grad is not None or hasattr(p, "main_grad") or id(p) in stepped]
    assert mpu.is_initialized()
    assert frozen
    return touched


@pytest.mark.parametrize("method", ["lora", "bitfit", "ft_top2"])
def test_a_step_leaves_frozen_parameters_alone(pool: Pool, method: str) -> None:
    experiment = replace(GPT, method={"name": method}, layout=Layout(pipeline=2))
    assert pool.run(2, frozen_after_a_step, experiment=experiment) == [[], []]

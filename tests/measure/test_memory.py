# SPDX-License-Identifier: Apache-2.0
"""Memory by kind: counts against sums done by hand; megatron-core's schedules give the same results under the meter."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn

from lora_megatron.config import MethodSection, ModelSection, OptimizerSection
from lora_megatron.measure.memory import ActivationMeter, MemoryByKind, gather_memory, weight_bytes
from lora_megatron.methods.choose import choose_method
from lora_megatron.model.build import BuildOptions, build
from lora_megatron.model.initialise import initialise_base
from lora_megatron.model.presets import resolve_shape
from lora_megatron.parallel.groups import Layout, build_mesh
from lora_megatron.training.choose_optimizer import choose_optimizer
from lora_megatron.training.optimizer import gradient_bytes, wrap_ddp
from lora_megatron.training.step import run_microbatches
from tests.pool import Pool

FLOAT = 4  # bytes


def linear(rows: int, columns: int) -> nn.Linear:
    return nn.Linear(columns, rows, bias=False)


def test_weights_count_each_storage_once_and_buffers_too() -> None:
    model = nn.Sequential(linear(3, 5), linear(3, 5))
    model[1].weight = model[0].weight
    model.register_buffer("table", torch.zeros(7, dtype=torch.int64))
    model.register_buffer("view", model.table[2:])
    assert weight_bytes([model]) == 15 * FLOAT + 7 * 8


def test_a_matrix_product_holds_its_input_and_no_weight() -> None:
    model = linear(3, 5)
    meter = ActivationMeter([model])
    x = torch.randn(8, 5)
    with meter:
        y = model(x)
        assert meter.live_bytes == 8 * 5 * FLOAT  # x, for dW; W itself is a weight and costs nothing more
        y.sum().backward()
    assert meter.live_bytes == 0
    assert meter.peak_bytes == 8 * 5 * FLOAT


def test_a_storage_saved_by_many_operations_counts_once_until_the_last_lets_go() -> None:
    model = nn.ModuleList([linear(3, 5), linear(2, 5)])
    x = torch.randn(8, 5)
    with ActivationMeter([model]) as meter:
        first, second = model[0](x), model[1](x.view(2, 4, 5))
        assert meter.live_bytes == 8 * 5 * FLOAT
        first.sum().backward()
        assert meter.live_bytes == 8 * 5 * FLOAT
        second.sum().backward()
        assert meter.live_bytes == 0


def test_the_peak_is_of_one_moment_and_not_a_sum_over_time() -> None:
    model = linear(5, 5)
    meter = ActivationMeter([model])
    with meter:
        for _ in range(3):
            model(torch.randn(8, 5)).sum().backward()
    assert meter.last_bytes == meter.peak_bytes == 8 * 5 * FLOAT
    with meter:
        model(torch.randn(2, 5)).sum().backward()
    assert meter.last_bytes == 2 * 5 * FLOAT
    assert meter.peak_bytes == 8 * 5 * FLOAT


def test_a_graph_that_is_dropped_or_kept_counts_as_long_as_it_lives() -> None:
    model = linear(5, 5)
    meter = ActivationMeter([model])
    with meter:
        y = model(torch.randn(8, 5))
        del y
        assert meter.live_bytes == 0
        y = model(torch.randn(8, 5))
    assert meter.live_bytes == 8 * 5 * FLOAT
    y.sum().backward()  # autograd frees after the meter has left
    assert meter.live_bytes == 0


def test_nothing_counts_without_gradients() -> None:
    model = linear(5, 5)
    with ActivationMeter([model]) as meter, torch.no_grad():
        model(torch.randn(8, 5))
    assert meter.peak_bytes == 0


def test_hooks_are_gone_after_an_exception() -> None:
    model = linear(5, 5)
    meter = ActivationMeter([model])
    with contextlib.suppress(ZeroDivisionError), meter:
        raise ZeroDivisionError
    y = model(torch.randn(8, 5))
    assert meter.live_bytes == 0
    assert y.requires_grad


def test_memory_adds_up() -> None:
    model = linear(5, 5)
    meter = ActivationMeter([model])
    with meter:
        model(torch.randn(8, 5)).sum().backward()
    expected = MemoryByKind(100, 100, 200, 160, peak=560, trained=100, reserved=560)
    assert meter.memory(gradients=100, optimizer=200) == expected
    model.bias = nn.Parameter(torch.zeros(5), requires_grad=False)
    idle = ActivationMeter([model]).memory(gradients=100, optimizer=200)
    assert idle == MemoryByKind(120, 100, 200, 0, peak=420, trained=100, reserved=420)


@dataclass(frozen=True)
class Case:
    """A tiny GPT of four layers with adapters on q and fc2, microbatches of one sample."""

    layout: Layout = field(default_factory=Layout)
    recompute: str = "none"
    sequence_length: int = 16
    microbatches: int = 4

    def with_layout(self, **layout: Any) -> Case:
        return replace(self, layout=Layout(**layout))


def batch(sample: int, length: int) -> dict[str, Any]:
    ids = torch.randint(0, 100, (1, length + 1), generator=torch.Generator().manual_seed(sample))
    return {
        "tokens": ids[:, :-1],
        "labels": ids[:, 1:],
        "loss_mask": torch.ones(1, length),
        "position_ids": torch.arange(length).expand(1, length),
        "attention_mask": None,
        "first_sample": sample,
    }


def measure(case: Case, *, metered: bool) -> dict[str, Any]:
    """Two training steps; losses and gradient buffers to compare, and every rank's memory."""
    build_mesh(case.layout, seed=1)
    shape = resolve_shape(ModelSection(preset="tiny", num_layers=4), tokenizer_vocab_size=100)
    method = choose_method(MethodSection(targets={"q": 4, "fc2": 2}), num_layers=shape.num_layers)
    chunks = build(shape, method, case.layout, BuildOptions("fp32", case.recompute))
    initialise_base(chunks, seed=3, num_layers=shape.num_layers)
    ddp = wrap_ddp(chunks, sharding="none", precision="fp32")
    optimizer = choose_optimizer(ddp, OptimizerSection(lr=1e-2), precision="fp32")
    meter = ActivationMeter(chunks)
    losses, gradients = [], []
    for step in range(2):
        batches = [batch(step * case.microbatches + m, case.sequence_length) for m in range(case.microbatches)]
        optimizer.zero_grad()
        with meter if metered else contextlib.nullcontext():
            loss = run_microbatches(ddp, batches)
        losses.append(loss.total)
        gradients += [buffer.grad_data.clone() for chunk in ddp for buffer in chunk.buffers]
        optimizer.step(loss.tokens)
    mine = meter.memory(gradients=gradient_bytes(ddp), optimizer=optimizer.state_bytes())
    return {
        "losses": losses,
        "gradients": gradients,
        "live": meter.live_bytes,
        "mine": asdict(mine),
        "all": [asdict(memory) for memory in gather_memory(mine)],
    }


@pytest.mark.parametrize(
    ("world", "case"),
    [
        (1, Case()),
        (1, Case(recompute="full")),
        (2, Case().with_layout(tensor=2, sequence=True)),
        (2, Case(recompute="selective").with_layout(pipeline=2)),
        (2, Case(recompute="full").with_layout(pipeline=2, virtual_pipeline=2)),
    ],
    ids=["one", "recompute", "tp2-sp", "pp2-selective", "pp2-vpp2-recompute"],
)
def test_the_meter_changes_no_result(pool: Pool, world: int, case: Case) -> None:
    plain = pool.run(world, measure, case=case, metered=False)
    metered = pool.run(world, measure, case=case, metered=True)
    for without, with_meter in zip(plain, metered, strict=True):
        assert with_meter["losses"] == without["losses"]
        assert without["gradients"]
        for mine, other in zip(with_meter["gradients"], without["gradients"], strict=True):
            assert torch.equal(mine, other)
        assert with_meter["mine"]["activations"] > 0 == with_meter["live"]
        assert with_meter["all"] == [rank["mine"] for rank in metered]
        memory = MemoryByKind(**with_meter["mine"])
        kinds = (memory.weights, memory.gradients, memory.optimizer, memory.activations)
        assert memory.peak == sum(kinds)
        assert min(kinds) > 0


def activations(pool: Pool, case: Case) -> list[int]:
    world = case.layout.model_size
    return [rank["mine"]["activations"] for rank in pool.run(world, measure, case=case, metered=True)]


def test_recomputation_and_sharding_show(pool: Pool) -> None:
    long = Case(sequence_length=64)
    (plain,) = activations(pool, long)
    (rebuilt,) = activations(pool, Case(sequence_length=64, recompute="full"))
    assert rebuilt < plain / 2
    for half in activations(pool, long.with_layout(tensor=2, sequence=True)):
        assert half < 0.75 * plain


def test_a_first_pipeline_stage_holds_more_microbatches_than_a_last(pool: Pool) -> None:
    """1F1B on two stages: two microbatches are in flight on the first, one on the last."""
    case = Case(sequence_length=64).with_layout(pipeline=2)
    many = activations(pool, case)
    one = activations(pool, replace(case, microbatches=1))
    assert many[0] == pytest.approx(2 * one[0], rel=0.05)
    assert many[1] == pytest.approx(one[1], rel=0.05)

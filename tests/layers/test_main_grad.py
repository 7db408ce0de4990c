# SPDX-License-Identifier: Apache-2.0
"""Gradients of factors that are added to DDP's fp32 sums at once are those that autograd would have handed to DDP.

In fp32 on a CPU the same numbers are added in the same order: equal to the bit. Of bf16 factors nothing is rounded on
the way, so they are nearer to sums taken in fp64. What autograd is handed in their stead is NaN throughout here: DDP
must not have looked at it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import Tensor, nn

from lora_megatron.layers import low_rank, main_grad
from lora_megatron.layers.low_rank import Update, add_low_rank
from lora_megatron.layers.low_rank_input import low_rank_input
from lora_megatron.layers.qkv import qkv_parts
from lora_megatron.layers.storage.choose import StorageFormat
from lora_megatron.model.names import named_parameters
from lora_megatron.parallel.groups import Layout, build_mesh
from lora_megatron.training.step import run_microbatches
from tests.pool import Pool
from tests.twin import Experiment, Run, build_chunks, own_batches

WIDE = {"num_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "ffn_hidden_size": 256}
GPT = Experiment(model={"preset": "tiny", "num_layers": 2})
LLAMA = replace(GPT, model={"preset": "tiny-llama", **WIDE}, method={"targets": {"q": 4, "v": 2, "gate": 3, "up": 1}})
EXPERIMENTS = {
    "gpt": GPT,
    "llama": replace(LLAMA, dropout=0.3),
    "recomputed": replace(GPT, recompute="full"),
    "one function of the MLP": replace(GPT, model={"preset": "tiny", **WIDE}, storage=StorageFormat("fp8")),
    "ZeRO of megatron": replace(GPT, optimizer={**GPT.optimizer, "sharding": "megatron"}),
}
LAYOUTS = {
    "one": Layout(),
    "dp2": Layout(),
    "tp2-sp": Layout(tensor=2, sequence=True),
    "pp2": Layout(pipeline=2),
}
Gradients = dict[str, Tensor]


def nan_like(factor: Tensor) -> Tensor:
    return torch.full_like(factor, float("nan"))


def without_a_flag(factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`already_added` that does not tell DDP."""
    return tuple(torch.ones_like(factor) for factor in factors)


def through_autograd() -> Any:
    return mock.patch.object(main_grad, "_main_grad_of", return_value=None)


def flag_not_set() -> Any:
    faults = contextlib.ExitStack()
    for module in (main_grad, low_rank):
        faults.enter_context(mock.patch.object(module, "already_added", without_a_flag))
    return faults


def not_added() -> Any:
    return mock.patch.object(main_grad, "_fp32_product", lambda left, right: torch.zeros(len(left), right.shape[1]))


def gradients(run: Run) -> Gradients:
    """All factors' sums after one step of several microbatches."""
    return after_a_step(run.ddp, run.experiment)


def after_a_step(ddp: list[DistributedDataParallel], experiment: Experiment) -> Gradients:
    run_microbatches(ddp, own_batches(experiment, 0))
    trained = [named for named in named_parameters([one.module for one in ddp]) if named.parameter.requires_grad]
    assert all(named.parameter.grad is None for named in trained)
    return {named.name: named.parameter.main_grad.clone() for named in trained}


def flags(run: Run) -> set[bool]:
    return {p.grad_added_to_main_grad for chunk in run.chunks for p in chunk.parameters() if p.requires_grad}


def both_ways(experiments: list[Experiment], layout: Layout) -> list[tuple[Gradients, Gradients, Gradients]]:
    """Of each: the sums of two steps, and those of autograd's gradients."""
    build_mesh(layout, seed=1, timeout_minutes=2)
    found = []
    for experiment in experiments:
        run = Run(experiment)
        with through_autograd():
            wanted = gradients(run)
        assert flags(run) == {False}
        with mock.patch.object(main_grad, "_unwritten", nan_like):
            found.append((gradients(run), gradients(run), wanted))
        assert flags(run) == {True}
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_sums_are_those_of_autograds_gradients(pool: Pool, name: str) -> None:
    experiments = [replace(one, layout=LAYOUTS[name]) for one in EXPERIMENTS.values()]
    ranks = 1 if name == "one" else 2
    for found in pool.run(ranks, both_ways, experiments=experiments, layout=LAYOUTS[name]):
        for case, (first, second, wanted) in zip(EXPERIMENTS, found, strict=True):
            assert all(bool(gradient.any()) for gradient in wanted.values()), case
            assert [key for key in wanted if not torch.equal(first[key], wanted[key])] == [], case
            assert [key for key in wanted if not torch.equal(second[key], wanted[key])] == [], case


def with_a_fault(fault: str) -> tuple[Gradients, Gradients]:
    build_mesh(Layout(), seed=1, timeout_minutes=2)
    run = Run(GPT)
    sound = gradients(run)
    with globals()[fault]():
        return gradients(run), sound


@pytest.mark.parametrize("fault", ["flag_not_set", "not_added"])
def test_a_fault_shows_in_every_factor(pool: Pool, fault: str) -> None:
    """So the runs above do add, and DDP does not add what autograd was handed."""
    broken, sound = pool.run(1, with_a_fault, fault=fault)[0]
    assert [key for key in sound if torch.equal(broken[key], sound[key])] == []


def with_overlap() -> tuple[Gradients, Gradients]:
    """One microbatch whose reductions start in the backward pass, for which DDP wants a gradient to be there."""
    build_mesh(Layout(), seed=1, timeout_minutes=2)
    experiment = replace(GPT, global_batch_size=1)
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True)
    chunks, _ = build_chunks(experiment)
    found = after_a_step([DistributedDataParallel(chunk.config, config, chunk) for chunk in chunks], experiment)
    return found, gradients(Run(experiment))


def test_reductions_may_overlap_the_backward_pass(pool: Pool) -> None:
    found, wanted = pool.run(1, with_overlap)[0]
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


def parameter_of(values: Tensor) -> Any:
    """A parameter with which is done what DDP does, with DDP's attributes, which no type knows."""

    def hook(parameter: Any) -> None:
        if not parameter.grad_added_to_main_grad:
            parameter.main_grad.add_(parameter.grad)
        parameter.grad = None

    made: Any = nn.Parameter(values)
    made.main_grad, made.grad_added_to_main_grad = torch.zeros(values.shape), False
    made.register_post_accumulate_grad_hook(hook)
    return made


def sums_of(dtype: torch.dtype, factors: dict[str, Tensor], *, shared: bool = False) -> dict[str, Tensor]:
    """Sums over three microbatches, of two A's and two B's of a fused output; `shared` has each used twice."""
    q, _, v = qkv_parts(4, 2, 3)
    a_q, a_v, b_q, b_v = leaves = [parameter_of(factor.to(dtype)) for factor in factors.values()]
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        x, back = (torch.randn(5, 2, n, generator=generator).bfloat16().to(dtype) for n in (7, 24))
        for _ in range(1 + shared):
            u, _ = low_rank_input(x, [a_q, a_v], None)
            # As kept for the backward pass in bf16, in every type.
            u = u.bfloat16().to(dtype) if dtype != torch.bfloat16 else u
            fused = add_low_rank(torch.zeros_like(back), Update((q, v), (0.5, 2.0), u, (b_q, b_v)))
            (fused * back).sum().backward()
    return {name: leaf.main_grad for name, leaf in zip(factors, leaves, strict=True)}


def factors() -> dict[str, Tensor]:
    shapes = {"A of q": (4, 7), "A of v": (1, 7), "B of q": (12, 4), "B of v": (6, 1)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def test_sums_of_bf16_factors_are_nearer_to_the_exact_ones() -> None:
    """B's are of tensors that are bf16 anyway; A's are those of a du that is rounded either way."""
    exact, ours = sums_of(torch.float64, factors()), sums_of(torch.bfloat16, factors())
    with through_autograd():
        rounded = sums_of(torch.bfloat16, factors())
    for name, want in exact.items():
        error, before = (float((sums[name] - want).norm() / want.norm()) for sums in (ours, rounded))
        assert error < before, name
        assert error < (1e-6 if name.startswith("B") else 4e-3), name


def test_a_factor_used_twice_is_summed_twice() -> None:
    once, twice = sums_of(torch.float32, factors()), sums_of(torch.float32, factors(), shared=True)
    for name, want in once.items():
        torch.testing.assert_close(twice[name], 2 * want, rtol=1e-6, atol=1e-6)


def test_a_hook_sees_the_gradient_and_may_change_it() -> None:
    x, a = torch.ones(5, 1, 3), parameter_of(torch.ones(2, 3))
    seen: list[Tensor] = []

    def doubled(gradient: Tensor) -> Tensor:
        seen.append(gradient)
        return 2 * gradient

    for hook in (a.register_hook(doubled), None):
        low_rank_input(x, [a], None)[0].sum().backward()
        assert a.grad_added_to_main_grad == (hook is None)
        if hook is not None:
            hook.remove()
    assert len(seen) == 1
    assert torch.equal(seen[0], torch.full((2, 3), 5.0))
    assert torch.equal(a.main_grad, torch.full((2, 3), 15.0))


def test_a_hook_in_the_middle_of_a_step_is_no_way_to_lose_a_gradient() -> None:
    """DDP would drop what autograd hands on for a factor that it was told about already."""
    x, a = torch.ones(5, 1, 3), parameter_of(torch.ones(2, 3))
    low_rank_input(x, [a], None)[0].sum().backward()
    a.register_hook(lambda gradient: gradient)
    with pytest.raises(AssertionError):
        low_rank_input(x, [a], None)[0].sum().backward()


def test_whom_autograd_hands_a_gradient() -> None:
    """Whose sum is not fp32, or gets `.grad` added whatever DDP is told, or nobody's."""
    alone, factor = nn.Parameter(torch.ones(2, 3)), parameter_of(torch.ones(2, 3))
    assert main_grad.main_grads_of([alone]) is None
    assert main_grad.main_grads_of([factor]) is not None
    assert main_grad.main_grads_of([factor, alone]) is None
    for changed in ({"zero_out_wgrad": True}, {"main_grad": torch.ones(2, 3).bfloat16()}, {"requires_grad": False}):
        other = parameter_of(torch.ones(2, 3))
        for name, value in changed.items():
            setattr(other, name, value)
        assert main_grad.main_grads_of([other]) is None, changed

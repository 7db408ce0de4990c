# SPDX-License-Identifier: Apache-2.0
"""One pass that clips, steps AdamW and rounds to bf16, against torch's AdamW in double.

On a GPU, or in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lora_megatron.training import adamw_pass
from lora_megatron.training.adamw_pass import AdamWPass
from tests.layers.test_low_rank_input_kernels import DEVICE, HAS_GPU, by_kernel, interpreted, large, random

LR, BETAS, EPS, DECAY, TOKENS, CLIP = 1e-2, (0.9, 0.999), 1e-8, 0.1, 6, 1.0
SIZES = [
    pytest.param((1, 7, 512, 513, 2000), marks=by_kernel, id="small"),
    pytest.param((16 * 12288, 12288 * 16, 4 * 24576), marks=large, id="GPT-3"),
]
every_size = pytest.mark.parametrize("sizes", SIZES)
small = pytest.mark.parametrize("sizes", SIZES[:1])


@pytest.fixture(autouse=True)
def kernels() -> Iterator[Any]:
    """With Triton's interpreter in the place of a GPU that is not there."""
    with contextlib.ExitStack() as patches:
        for patch in () if HAS_GPU else interpreted():
            patches.enter_context(patch)
        yield adamw_pass.kernels


class Factors:
    """Some factors beside each other in DDP's manner: gradients in one buffer, at any place; the rest their own."""

    def __init__(self, sizes: Sequence[int], *, offset: int = 0) -> None:
        total = sum(sizes)
        self.buffer = torch.zeros(offset + total + 1, device=DEVICE)
        self.gradients = list(self.buffer[offset : offset + total].split(list(sizes)))
        self.masters = [random(n, seed=n, dtype=torch.float32) * 0.02 for n in sizes]
        self.parameters = [torch.full((n,), 7.0, dtype=torch.bfloat16, device=DEVICE) for n in sizes]
        self.firsts, self.seconds = ([torch.zeros(n, device=DEVICE) for n in sizes] for _ in range(2))

    def draw(self, step: int) -> None:
        """Sums of gradients, whose sizes differ by thousands within a factor; beyond them, what nobody may read."""
        self.buffer.fill_(math.nan)
        for index, gradient in enumerate(self.gradients):
            n = gradient.numel()
            spread = torch.logspace(-3, 0, n, device=DEVICE)
            gradient.copy_(TOKENS * 0.1 * spread * random(n, seed=100 * step + index, dtype=torch.float32))

    def stepped(self, kernels: Any) -> list[Any]:
        every = zip(self.gradients, self.masters, self.firsts, self.seconds, self.parameters, strict=True)
        return [kernels.Stepped(*each) for each in every]


def numbers(step: int, factor: float, *, is_due: bool = True) -> Tensor:
    bias = [1 - beta**step for beta in BETAS]
    values = [factor, LR / bias[0], math.sqrt(bias[1]), LR * DECAY, float(is_due)]
    return torch.tensor(values, dtype=torch.float64).float().to(DEVICE)


def off(found: Tensor, wanted: Tensor, *, least: float = 0.0) -> float:
    """The largest difference to the largest number, or to `least`."""
    return float((found.double() - wanted).abs().max()) / max(float(wanted.abs().max()), least)


@every_size
@pytest.mark.parametrize("offset", [0, 1])
def test_steps_are_those_of_torch_in_double(sizes: Sequence[int], offset: int, kernels: Any) -> None:
    """At a place that 16 bytes divide, and at one that they do not."""
    own = Factors(sizes, offset=offset)
    wanted = [torch.nn.Parameter(master.double()) for master in own.masters]
    adamw = torch.optim.AdamW(wanted, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    table = kernels.table_of(own.stepped(kernels))
    assert table.aligned == (16 if all(g.data_ptr() % 16 == 0 for g in own.gradients) else 4)
    for step in range(1, 5):
        own.draw(step)
        before, factor = own.buffer.clone(), 0.3 / TOKENS
        for parameter, gradient in zip(wanted, own.gradients, strict=True):
            parameter.grad = gradient.double() * factor
        adamw.step()
        kernels.step(table, numbers(step, factor), betas=BETAS, eps=EPS)
        assert torch.equal(own.buffer.nan_to_num(9.0), before.nan_to_num(9.0))
    for index, parameter in enumerate(wanted):
        state = adamw.state[parameter]
        assert off(own.masters[index], parameter.detach(), least=LR) < 1e-6  # a step's size, whatever is left of them
        assert off(own.firsts[index], state["exp_avg"]) < 1e-6
        assert off(own.seconds[index], state["exp_avg_sq"]) < 1e-6
        assert torch.equal(own.parameters[index], own.masters[index].bfloat16())


@small
@pytest.mark.parametrize("beta", [0.999, 0.99999])
def test_moments_stay_where_they_have_settled(sizes: Sequence[int], beta: float, kernels: Any) -> None:
    """Of a gradient that is always the same: weights that do not add up to 1 would move them in every step."""
    own = Factors(sizes)
    own.draw(1)
    for gradient, first, second in zip(own.gradients, own.firsts, own.seconds, strict=True):
        first.copy_(gradient)
        second.copy_(gradient * gradient)
    table, before = kernels.table_of(own.stepped(kernels)), [t.double() for t in (*own.firsts, *own.seconds)]
    for _ in range(40):
        kernels.step(table, numbers(1000, 1.0), betas=(0.9, beta), eps=EPS)
    for found, wanted in zip((*own.firsts, *own.seconds), before, strict=True):
        assert off(found, wanted) < 2e-7


@small
def test_nothing_changes_where_nothing_is_due(sizes: Sequence[int], kernels: Any) -> None:
    own = Factors(sizes)
    own.draw(1)
    own.gradients[0].fill_(math.nan)
    kept = [t.clone() for t in (*own.masters, *own.firsts, *own.seconds, *own.parameters)]
    kernels.step(kernels.table_of(own.stepped(kernels)), numbers(1, 1.0, is_due=False), betas=BETAS, eps=EPS)
    assert all(map(torch.equal, kept, (*own.masters, *own.firsts, *own.seconds, *own.parameters)))


class Inner:
    """As much of megatron-core's optimizer as a step asks for."""

    def __init__(self, own: Factors) -> None:
        self.adamw = torch.optim.AdamW(own.masters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)
        self.masters, self.parameters, self.gradients = own.masters, own.parameters, own.gradients
        self.is_steady = True

    def step_with_ready_grads(self) -> None:
        self.adamw.step()
        torch._foreach_copy_(self.parameters, self.masters)


def course(sizes: Sequence[int], *, by_kernel: bool) -> tuple[Factors, list[float], list[float]]:
    """(factors after steps, one of which is not finite; their norms; AdamW's counts)"""
    own = Factors(sizes)
    for master, gradient in zip(own.masters, own.gradients, strict=True):
        master.grad = gradient
    inner, norms = Inner(own), []

    def norm(_: Any) -> Tensor:
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(own.gradients)).double())

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(adamw_pass, "global_norm", norm))
        if not by_kernel:
            patches.enter_context(mock.patch.object(adamw_pass, "kernels", None))
        work = AdamWPass(inner, [inner], clip_grad=CLIP)  # type: ignore[list-item]  # it has what is asked of lists
        with mock.patch.object(adamw_pass, "_is_for_kernels", return_value=True):
            for step in range(1, 6):
                own.draw(step)
                if step == 3:
                    own.gradients[-1][0] = math.inf
                work.fill(float(torch.tensor(LR / step, dtype=torch.float32)), TOKENS + step)
                norms.append(float(work.run()))
    state = inner.adamw.state
    own.firsts, own.seconds = ([state[m][kind] for m in own.masters] for kind in ("exp_avg", "exp_avg_sq"))
    return own, norms, [float(state[m]["step"]) for m in own.masters]


@every_size
def test_whole_steps_are_those_without_the_kernel(sizes: Sequence[int], kernels: Any) -> None:
    own, norms, counts = course(sizes, by_kernel=True)
    its, its_norms, its_counts = course(sizes, by_kernel=False)
    assert [math.isfinite(norm) for norm in norms] == [True, True, False, True, True]
    assert max(filter(math.isfinite, norms)) > CLIP, "clipping is active"
    assert counts == its_counts == [4.0] * len(sizes)
    assert norms[:2] + norms[3:] == its_norms[:2] + its_norms[3:]
    for kind in ("masters", "firsts", "seconds"):
        for mine, other in zip(getattr(own, kind), getattr(its, kind), strict=True):
            # torch's, on an H200, is off by 1.3e-5 of the second moment, as with 1 - beta of a beta in float32.
            assert off(mine, other.double(), least=LR if kind == "masters" else 0.0) < 2e-5, kind
    assert all(torch.equal(p, m.bfloat16()) for p, m in zip(own.parameters, own.masters, strict=True))

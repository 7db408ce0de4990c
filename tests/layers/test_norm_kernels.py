# SPDX-License-Identifier: Apache-2.0
"""A norm's input gradient by Triton's kernel, with that of the residual added, against plain algebra in fp64.

On a GPU, or in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lora_megatron.layers import norm
from lora_megatron.layers.rebuilt import taken_over
from tests.layers.test_low_rank_input_kernels import HAS_GPU, NORMS, by_kernel, interpreted, large, off, random

EPS = 1e-5
TYPES = [pytest.param(torch.float32, 1e-6, id="fp32"), pytest.param(torch.bfloat16, 4e-3, id="bf16")]
SHAPES = [
    *(
        pytest.param(shape, marks=by_kernel, id=str(shape))
        for shape in ((5, 2, 64), (7, 1, 515), (3, 3, 1), (1, 1, 150))
    ),
    pytest.param((2048, 1, 12288), marks=large, id="GPT-3"),
]
every_norm = pytest.mark.parametrize("name", NORMS)
every_shape = pytest.mark.parametrize("shape", SHAPES)


@pytest.fixture(autouse=True)
def kernels() -> Iterator[Any]:
    """With Triton's interpreter in the place of a GPU that is not there."""
    with contextlib.ExitStack() as patches:
        for patch in () if HAS_GPU else interpreted():
            patches.enter_context(patch)
        yield norm.kernels


class Problem:
    """x, dL/dy, the residual's gradient, weight and, of LayerNorm, bias."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.x = 2 * random(*shape, seed=3, dtype=dtype) + 0.5
        self.grad, self.beside = (random(*shape, seed=seed, dtype=dtype) for seed in (4, 5))
        self.weight = 1 + 0.3 * random(shape[-1], seed=6, dtype=dtype)
        self.bias = random(shape[-1], seed=7, dtype=dtype) if name == "LayerNorm" else None

    def in_fp32(self) -> Problem:
        """The same numbers."""
        for which in ("x", "grad", "beside", "weight", "bias"):
            tensor = getattr(self, which)
            setattr(self, which, None if tensor is None else tensor.float())
        return self

    def gradient(self, kernels: Any, beside: Tensor | None) -> Tensor:
        centred = self.bias is not None
        statistics = kernels.room_for_statistics(self.x, centred=centred)
        kernels.norm(self.x, self.weight, self.bias, EPS, statistics)
        found: Tensor = kernels.norm_gradient(
            self.x, self.grad, self.weight, statistics, centred=centred, beside=beside
        )
        return found

    def wanted(self) -> Tensor:
        x, width = self.x.double().requires_grad_(), (self.x.shape[-1],)
        if self.bias is None:
            y = functional.rms_norm(x, width, self.weight.double(), EPS)
        else:
            y = functional.layer_norm(x, width, self.weight.double(), self.bias.double(), EPS)
        return torch.autograd.grad(y, x, self.grad.double())[0] + self.beside.double()


@every_shape
@pytest.mark.parametrize(("dtype", "bound"), TYPES)
@every_norm
def test_the_sum_is_that_of_plain_algebra(
    kernels: Any, name: str, dtype: torch.dtype, bound: float, shape: tuple[int, ...]
) -> None:
    """Of rows that fill no power of two; to the bit the same when it is done again."""
    problem = Problem(name, shape, dtype)
    got = problem.gradient(kernels, problem.beside)
    assert got.dtype == dtype
    # The rounding of a row of one value, which is its own mean, is divided by sqrt(eps).
    assert off(got, problem.wanted()) < (max(bound, 1e-5) if shape[-1] == 1 else bound)
    assert torch.equal(got, problem.gradient(kernels, problem.beside))


@every_shape
@every_norm
def test_the_sum_is_rounded_once(kernels: Any, name: str, shape: tuple[int, ...]) -> None:
    """bf16 is what the same numbers give in fp32, rounded; but for a few of a million values on a GPU, whose sums are
    compiled for each type in an order of their own."""
    problem = Problem(name, shape, torch.bfloat16)
    got, twice = problem.gradient(kernels, problem.beside), problem.gradient(kernels, None) + problem.beside
    want = problem.in_fp32().gradient(kernels, problem.beside).bfloat16()
    apart, apart_twice = (float((each != want).float().mean()) for each in (got, twice))
    assert apart < (1e-3 if HAS_GPU else 1e-9)
    assert shape[-1] == 1 or apart_twice > 0.05, "a rounding on the way would be seen"


@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@every_norm
def test_without_an_addend_it_is_as_with_zeros(
    kernels: Any, name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    problem = Problem(name, shape, dtype)
    assert torch.equal(problem.gradient(kernels, None), problem.gradient(kernels, torch.zeros_like(problem.x)))


@pytest.mark.parametrize("read", ["both", "y", "residual", "both, of another layout"])
@pytest.mark.parametrize("shape", [pytest.param((7, 2, 150), marks=by_kernel, id="small")])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@every_norm
def test_a_norm_beside_a_residual_has_it_added_there(
    kernels: Any, name: str, trained: bool, shape: tuple[int, ...], read: str
) -> None:
    """In one launch, unless its parameters train."""
    config: Any = SimpleNamespace(
        params_dtype=torch.float32, use_cpu_initialization=not HAS_GPU, sequence_parallel=False
    )
    problem, module = Problem(name, shape, torch.float32), NORMS[name](config, shape[-1], beside_residual=True)
    module.requires_grad_(trained)
    with torch.no_grad():
        for parameter, values in zip(module.parameters(), (problem.weight, problem.bias), strict=False):
            assert values is not None
            parameter.copy_(values)
    leaf = problem.x.requires_grad_()
    h = leaf * 1
    y, beside = module(h), problem.beside
    residual = taken_over(h)
    assert residual is not h
    pairs = [(y, problem.grad)] if read != "residual" else []
    if read == "both, of another layout":
        residual, beside = residual.transpose(0, 1) * 1, beside.transpose(0, 1).contiguous()
    if read != "y":
        pairs.append((residual, beside))
    with mock.patch.object(kernels, "norm_gradient", side_effect=kernels.norm_gradient) as launched:
        torch.autograd.backward([t for t, _ in pairs], [grad for _, grad in pairs])
    want = problem.wanted()
    want = problem.beside if read == "residual" else want - problem.beside.double() if read == "y" else want
    assert leaf.grad is not None
    assert off(leaf.grad, want.double()) < 1e-6
    assert launched.call_count == (0 if trained or read == "residual" else 1)
    if launched.call_count:
        assert (launched.call_args.kwargs["beside"] is None) == (read == "y")

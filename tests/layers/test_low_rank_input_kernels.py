# SPDX-License-Identifier: Apache-2.0
"""dA from a norm's input and dx += du A by Triton kernels, against plain algebra in fp64.

They run on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1); on a CPU alone all that runs is how work is cut.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_megatron.layers import low_rank_input, norm
from lora_megatron.layers import low_rank_input_tiles as tiles
from lora_megatron.layers.dropout import Dropout
from lora_megatron.layers.frozen import frozen_linear

HAS_GPU, INTERPRETED = torch.cuda.is_available(), os.environ.get("TRITON_INTERPRET") == "1"
CPU, DEVICE = torch.device("cpu"), torch.device("cuda" if HAS_GPU else "cpu")
by_kernel = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (HAS_GPU or INTERPRETED), reason="needs a GPU, or Triton's interpreter"),
]
large = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU: too much for an interpreter")]
NORMS: dict[str, type[norm.LayerNorm]] = {"LayerNorm": norm.LayerNorm, "RMSNorm": norm.RMSNorm}
TYPES = [pytest.param(torch.float32, 3e-6, id="fp32"), pytest.param(torch.bfloat16, 6e-3, id="bf16")]
RANKS = [(5,), (16,), (64,), (3, 16), (16, 16, 16), (1, 30, 7)]
SIZES = [pytest.param(70, 150, id="small", marks=by_kernel), pytest.param(2100, 12288, id="large", marks=large)]
DX, DA = "add_to_input_gradient", "factor_gradients_of_normed"


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def interpreted() -> list[Any]:
    """In Triton's interpreter a CPU's tensors are taken for a GPU's, and spans of tokens are short. It multiplies bf16
    as the whole numbers of its bits, and cuts off where a GPU rounds: here it does as a GPU."""
    import numpy as np
    import triton.language as tl  # both where Triton is
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, interpreter_builder

    from lora_megatron.layers import low_rank_input_kernels as kernels

    product, truncated = InterpreterBuilder.create_dot, InterpreterBuilder().create_fp_trunc

    def widened(tile: Any) -> Any:
        if tile.dtype.scalar != tl.bfloat16:
            return tile
        return TensorHandle((tile.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return product(self, widened(a), widened(b), *rest)

    def rounded(tile: Any, to: Any) -> Any:
        if to.scalar != tl.bfloat16:
            return truncated(tile, to)
        bits = torch.from_numpy(np.ascontiguousarray(tile.data)).bfloat16().view(torch.int16)
        return TensorHandle(bits.numpy().view(np.uint16), to.scalar)

    short = {most: tile._replace(span=2 * tile.tokens) for most, tile in tiles.GRADIENT_TILES.items()}
    return [
        mock.patch.object(kernels, "can_take", kernels.made_for),
        mock.patch.object(norm, "_by_kernel", return_value=True),
        mock.patch.object(InterpreterBuilder, "create_dot", create_dot),
        mock.patch.object(interpreter_builder, "create_fp_trunc", rounded),
        mock.patch.dict(tiles.GRADIENT_TILES, short),
    ]


@pytest.fixture
def started() -> Iterator[list[str]]:
    """Which passes have been, one after the other."""
    from lora_megatron.layers import low_rank_input_kernels as kernels  # needs Triton

    names = list[str]()

    def noted(name: str) -> Callable[..., Any]:
        original = getattr(kernels, name)
        return lambda *args: (names.append(name), original(*args))[1]

    with contextlib.ExitStack() as patches:
        for name in (DX, DA):
            patches.enter_context(mock.patch.object(kernels, name, noted(name)))
        for patch in () if HAS_GPU else interpreted():
            patches.enter_context(patch)
        yield names


class Problem:
    """A norm, adapters that read it and a large product beside them; as leaves h [s, b, width] and each A."""

    def __init__(self, name: str, ranks: tuple[int, ...], dtype: torch.dtype, tokens: int, width: int) -> None:
        config: Any = SimpleNamespace(params_dtype=dtype, use_cpu_initialization=not HAS_GPU, sequence_parallel=False)
        self.norm, self.dtype = NORMS[name](config, width), dtype
        for index, parameter in enumerate(self.norm.parameters()):
            parameter.requires_grad_(False).copy_(1 + 0.3 * random(width, seed=index, dtype=dtype))
        self.h = (2 * random(tokens // 2, 2, width, seed=3, dtype=dtype) + 0.5).requires_grad_()
        self.factors = [nn.Parameter(random(r, width, seed=5 + i, dtype=dtype)) for i, r in enumerate(ranks)]
        self.weight, self.back = (
            random(24, width, seed=9, dtype=dtype),
            random(*self.h.shape[:2], 24, seed=10, dtype=dtype),
        )
        self.back_u = random(*self.h.shape[:2], sum(ranks), seed=11, dtype=dtype)

    def gradients(self, dropout: Dropout | None = None) -> list[Tensor]:
        """Of h and of each A."""
        leaves = [self.h, *self.factors]
        for leaf in leaves:
            leaf.grad = None
        u, x = low_rank_input.low_rank_input(self.norm(self.h), self.factors, dropout)
        torch.autograd.backward([u, frozen_linear(x, self.weight)], [self.back_u, self.back])
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    def wanted(self) -> list[Tensor]:
        """The same by autograd in fp64."""
        h, *factors = leaves = [t.detach().double().requires_grad_() for t in (self.h, *self.factors)]
        width, weight = (h.shape[-1],), self.norm.weight.double()
        if self.norm.bias is None:
            x = functional.rms_norm(h, width, weight, self.norm.eps)
        else:
            x = functional.layer_norm(h, width, weight, self.norm.bias.double(), self.norm.eps)
        found = torch.autograd.grad(
            [x @ torch.cat(factors).t(), x @ self.weight.double().t()],
            leaves,
            [self.back_u.double(), self.back.double()],
        )
        return list(found)


def off(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want).norm() / want.norm())


@pytest.mark.parametrize(("tokens", "width"), SIZES)
@pytest.mark.parametrize(("dtype", "bound"), TYPES)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_gradients_are_those_of_plain_algebra(
    started: list[str], name: str, ranks: tuple[int, ...], dtype: torch.dtype, bound: float, tokens: int, width: int
) -> None:
    """And to the bit the same when they are computed again; tokens and columns fill no tile."""
    problem = Problem(name, ranks, dtype, tokens, width)
    got = problem.gradients()
    assert started == [DX, DA]
    assert len(got) == 1 + len(ranks)
    for one, want in zip(got, problem.wanted(), strict=True):
        assert one.dtype == dtype
        assert off(one, want) < bound
    assert all(torch.equal(one, again) for one, again in zip(got, problem.gradients(), strict=True))


@pytest.mark.parametrize(("tokens", "width"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("ranks", [(16,), (16, 4, 16)], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_factors_gradients_are_added_to_ddps_sums(
    started: list[str], name: str, ranks: tuple[int, ...], dtype: torch.dtype, tokens: int, width: int
) -> None:
    """Twice, to what is there, from x as the norm rounds it and not rounded any more."""
    problem = Problem(name, ranks, dtype, tokens, width)
    factors: list[Any] = list(problem.factors)  # with DDP's attributes, which no type knows
    for factor in factors:
        factor.main_grad, factor.grad_added_to_main_grad = torch.ones_like(factor, dtype=torch.float32), False
    for _ in range(2):
        problem.gradients()
    assert started == 2 * [DX, DA]
    x = problem.norm(problem.h).detach().flatten(0, 1).double()
    want = problem.back_u.flatten(0, 1).double().t() @ x
    for factor, gradient in zip(factors, want.split(ranks), strict=True):
        assert factor.grad_added_to_main_grad
        assert off(factor.main_grad - 1, 2 * gradient) < 3e-6


@pytest.mark.parametrize(("tokens", "width"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", NORMS)
def test_x_has_the_bits_that_the_norm_writes(
    started: list[str], name: str, dtype: torch.dtype, tokens: int, width: int
) -> None:
    """dA is a row of x for a du that is one for its token alone."""
    problem = Problem(name, (31, 33), dtype, tokens, width)
    rows = torch.arange(64, device=DEVICE) * (tokens - 1) // 63
    problem.back_u.zero_().view(tokens, 64)[rows, torch.arange(64, device=DEVICE)] = 1
    _, *found = problem.gradients()
    assert started == [DX, DA]
    assert torch.equal(torch.cat(found), problem.norm(problem.h).detach().view(tokens, width)[rows])


@pytest.mark.parametrize(("tokens", "width"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_what_is_added_to_an_input_gradient_is_rounded_once(
    started: list[str], ranks: tuple[int, ...], dtype: torch.dtype, tokens: int, width: int
) -> None:
    """Of whole numbers, whose products and sums fp32 holds exactly."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-20, 21, shape, generator=generator, device=DEVICE).to(dtype)

    grad_x, du, factors = whole(tokens, width) / 8, whole(tokens, sum(ranks)), [whole(r, width) for r in ranks]
    want = (grad_x.double() + du.double() @ torch.cat(factors).double()).to(dtype)
    got = low_rank_input.add_input_gradient(grad_x, du, factors, None)
    assert started == [DX]
    assert got.data_ptr() == grad_x.data_ptr()
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("why", ["dropout", "large ranks", "four adapters", "a norm that trains", "no statistics"])
@pytest.mark.parametrize("device", [pytest.param(DEVICE, marks=by_kernel)], ids=["kernel"])
def test_what_the_kernels_are_not_made_for_goes_the_other_way(
    started: list[str], why: str, name: str, device: torch.device
) -> None:
    """But a norm's parameters, which the kernel reads whoever trains them."""
    ranks = {"large ranks": (60, 5), "four adapters": (1, 2, 3, 4)}.get(why, (4, 8))
    problem = Problem(name, ranks, torch.float32, 70, 40)
    want = problem.wanted()
    if why == "a norm that trains":
        problem.norm.requires_grad_(True)
    if why == "no statistics":
        with mock.patch.object(norm, "_by_kernel", return_value=False):
            got = problem.gradients()
    elif why == "dropout":
        dropped = problem.gradients(Dropout(0.5, 3, 0))
        with mock.patch.object(low_rank_input, "kernels", None):
            got, want = dropped, [t.double() for t in problem.gradients(Dropout(0.5, 3, 0))]
    else:
        got = problem.gradients()
    assert started == {"a norm that trains": [DX, DA], "no statistics": [DX]}.get(why, [])
    assert all(off(one, other) < 3e-6 for one, other in zip(got, want, strict=True))
    if why == "a norm that trains":
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in problem.norm.parameters())


@pytest.mark.parametrize("table", tiles.TABLES, ids=["dA", "dx"])
def test_tiles_are_what_a_tensor_core_takes(table: dict[int, tiles.Tile]) -> None:
    assert list(table) == sorted(table)
    for tile in table.values():
        assert all(n & (n - 1) == 0 for n in tile[:4]), "powers of two"
        assert min(tile.tokens, tile.columns) >= 16
        assert tile.span % tile.tokens == 0


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("table", tiles.TABLES, ids=["dA", "dx"])
def test_large_ranks_and_many_factors_have_no_tile(table: dict[int, tiles.Tile], itemsize: int) -> None:
    for ranks, known in (((64,), True), ((1, 2, 61), True), ((1, 64), False), ((1, 1, 1, 1), False), ((), False)):
        assert (tiles.tile_of(ranks, itemsize, table) is not None) == known


@pytest.mark.parametrize("tokens", [1, 256, 2100])
@pytest.mark.parametrize("ranks", [(5,), (3, 16, 45)], ids=str)
def test_sums_have_places_of_their_own(ranks: tuple[int, ...], tokens: int) -> None:
    cut = tiles.addends_of(ranks, tokens, 300, 256, CPU)
    assert cut.pieces == math.ceil(tokens / 256)
    assert cut.size == cut.pieces * sum(ranks) * 300
    assert cut.longest == 300 * max(ranks)
    for index, rank in enumerate(ranks):
        nothing, row = cut.table[2 * index : 2 * index + 2].tolist()
        assert nothing[2] == 0, "du is not summed here"
        before, length = 300 * sum(ranks[:index]), 300 * rank
        assert row == [cut.pieces * before, cut.pieces, length, length, 0, before]


@pytest.mark.parametrize("tokens", [128, 256, 257, 2048, 2100])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_addends_are_no_larger_than_the_x_that_is_not_made(itemsize: int, tokens: int) -> None:
    """So the plan need not know of them."""
    for ranks in RANKS:
        tile = tiles.tile_of(ranks, itemsize, tiles.GRADIENT_TILES)
        assert tile is not None
        assert 4 * tiles.addends_of(ranks, tokens, 300, tile.span, CPU).size <= itemsize * tokens * 300

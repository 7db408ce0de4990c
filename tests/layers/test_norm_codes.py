# SPDX-License-Identifier: Apache-2.0
"""FP8 codes that a norm's kernels write beside y and dx, against quantising these as they lie in memory.

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

from lora_megatron.layers import norm
from lora_megatron.layers.frozen import frozen_linear
from lora_megatron.layers.low_rank_input import low_rank_input
from lora_megatron.layers.norm import LayerNorm, ReadInFp8
from lora_megatron.layers.rebuilt import taken_over
from lora_megatron.layers.storage import fp8, left_codes
from lora_megatron.layers.storage.fp8 import scale_of, to_fp8
from lora_megatron.layers.storage.left_codes import Quantised
from tests.layers.test_low_rank_input_kernels import DEVICE, HAS_GPU, NORMS, by_kernel, interpreted, large
from tests.layers.test_norm_kernels import EPS, Problem, every_norm

BOTH = ReadInFp8(output=True, gradient=True)
WIDE = [pytest.param((37, 2, 12288), marks=large, id="wide"), pytest.param((2048, 1, 12288), marks=large, id="GPT-3")]
SHAPES = [*(pytest.param(shape, marks=by_kernel, id=str(shape)) for shape in ((5, 2, 64), (7, 1, 515), (3, 3, 1)))]
TYPES = [torch.bfloat16, torch.float32]


def rounded_to_fp8() -> Any:
    """The interpreter cuts off where a GPU rounds (`test_low_rank_input_kernels.interpreted`)."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, interpreter_builder

    original = InterpreterBuilder.create_fp_to_fp

    def rounded(tile: Any, to: Any, mode: Any) -> Any:
        if to.scalar != tl.float8e4nv:
            return original(interpreter_builder, tile, to, mode)
        codes = torch.from_numpy(tile.data.copy()).to(fp8.FP8)
        return TensorHandle(codes.view(torch.uint8).numpy(), to.scalar)

    return mock.patch.object(interpreter_builder, "create_fp_to_fp", rounded)


@pytest.fixture(autouse=True)
def kernels() -> Iterator[Any]:
    """With Triton's interpreter in the place of a GPU that is not there."""
    with contextlib.ExitStack() as patches:
        for patch in () if HAS_GPU else (*interpreted(), rounded_to_fp8()):
            patches.enter_context(patch)
        yield norm.kernels


def same(got: Any, want: Any) -> bool:
    return all(
        torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in zip(got, want, strict=True)
    )


def quantised(x: Tensor) -> Quantised:
    """In plain torch, as `fp8.quantise_tokens` does on a CPU."""
    rows = x.reshape(-1, x.shape[-1]).cpu()
    scale = scale_of(rows.float().abs().amax(1, keepdim=True))
    return Quantised(to_fp8(rows, scale).to(x.device), scale.to(x.device))


@pytest.mark.parametrize("shape", [*SHAPES, *WIDE])
@pytest.mark.parametrize("dtype", TYPES, ids=["bf16", "fp32"])
@every_norm
def test_codes_are_those_of_what_is_stored(kernels: Any, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """To the bit, of y and dx as they are rounded, which are what they are without codes; of rows of zeros too."""
    from lora_megatron.layers.storage.kernels import quantise_rows, room_for_codes  # needs Triton

    problem = Problem(name, shape, dtype)
    problem.x += 400  # a mean that would be seen of what is past the end of a row
    for rows in (problem.x, problem.grad, problem.beside):
        rows.view(-1, shape[-1])[[1, -1]] = 0
    if problem.bias is not None:
        problem.bias.zero_()
    weight, centred = problem.weight, problem.bias is not None
    statistics = kernels.room_for_statistics(problem.x, centred=centred)
    of_y, of_dx = room_for_codes(problem.x), room_for_codes(problem.x)
    y = kernels.norm(problem.x, weight, problem.bias, EPS, statistics, of_y)
    # Another kernel to the compiler, which may order fp32 sums otherwise: of numbers about 400, of which 1e-4 is left.
    apart = 0.0 if dtype == torch.bfloat16 else 1e-3
    torch.testing.assert_close(
        y, kernels.norm(problem.x, weight, problem.bias, EPS, statistics), rtol=apart, atol=apart
    )
    more: Any = {"centred": centred, "beside": problem.beside}
    dx = kernels.norm_gradient(problem.x, problem.grad, weight, statistics, **more, quantised=of_dx)
    without = kernels.norm_gradient(problem.x, problem.grad, weight, statistics, **more)
    torch.testing.assert_close(dx, without, rtol=apart, atol=apart)
    for values, got in ((y, of_y), (dx, of_dx)):
        rows = values.view(-1, shape[-1])
        assert not rows[1].any()
        assert got[1][1].item() == 1
        assert same(got, quantise_rows(rows, None))
        assert same(got, quantised(rows))


@pytest.mark.parametrize("shape", SHAPES[:2] + WIDE[:1])
@every_norm
def test_rounding_comes_before_the_codes(kernels: Any, name: str, shape: tuple[int, ...]) -> None:
    """Of numbers that are not rounded to bf16 first, some codes differ: the comparison would see that."""
    problem = Problem(name, shape, torch.bfloat16)
    statistics = kernels.room_for_statistics(problem.x, centred=problem.bias is not None)
    y = kernels.norm(problem.x, problem.weight, problem.bias, EPS, statistics)
    exact = problem.in_fp32()
    unrounded = kernels.norm(exact.x, exact.weight, exact.bias, EPS, statistics)
    assert float((unrounded.bfloat16() != y).float().mean()) < 0.4, "the same numbers"
    assert not same(quantised(y), quantised(unrounded))


def layer(name: str, width: int, in_fp8: ReadInFp8) -> LayerNorm:
    config: Any = SimpleNamespace(
        params_dtype=torch.bfloat16, use_cpu_initialization=not HAS_GPU, sequence_parallel=False
    )
    return NORMS[name](config, width, beside_residual=True, in_fp8=in_fp8).requires_grad_(False)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("shape", [pytest.param((6, 2, 64), marks=by_kernel, id="small")])
@every_norm
def test_a_norm_leaves_them_to_the_product_that_reads_it(name: str, shape: tuple[int, ...], adapted: bool) -> None:
    """Both of them taken, in a forward and a backward pass; the rest of what the product does is as it was."""
    from tests.layers.test_left_codes import frozen_fp8

    width, found = shape[-1], list[tuple[Tensor, ...]]()
    for in_fp8 in (BOTH, ReadInFp8()):
        taken = list[bool]()

        def noted(x: Tensor, taken: list[bool] = taken) -> Quantised | None:
            taken.append((got := left_codes.take(x)) is not None)
            return got

        problem = Problem(name, shape, torch.bfloat16)
        first, second = frozen_fp8(width, width, axis=1), frozen_fp8(width, width, axis=0)
        factor = problem.weight.expand(4, -1).clone().requires_grad_()
        leaf = problem.x.requires_grad_()
        with mock.patch.object(fp8, "take", noted):
            h = frozen_linear(leaf, first)
            x = y = layer(name, width, in_fp8)(h)
            u = [] if not adapted else [(made := low_rank_input(y, [factor], None))[0]]
            x = made[1] if adapted else x
            out = frozen_linear(x, second) + taken_over(h)
            taken_forward = list(taken)
            torch.autograd.backward([out, *u], [problem.grad, *(torch.ones_like(one) for one in u)])
        # `first` multiplies its input with a factor, and `second` its output's gradient: for these nothing is left.
        assert taken_forward == [in_fp8.output]
        assert taken[1:] == [in_fp8.gradient]
        found.append((out.detach(), leaf.grad, *([factor.grad] if adapted else [])))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    assert found[0][0].device.type == DEVICE.type

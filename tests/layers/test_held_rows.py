# SPDX-License-Identifier: Apache-2.0
"""FP8 codes of rows that a kernel holds (`storage.held_rows`) or reads twice, against plain torch.

On a GPU, or in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

from lora_megatron.layers import activation_kernels
from lora_megatron.layers import held_activation_kernels as held_activation
from lora_megatron.layers.activation import ACTIVATIONS, Activation
from lora_megatron.layers.storage.fp8 import scale_of, to_fp8
from lora_megatron.layers.storage.held_rows import WIDEST, can_hold
from lora_megatron.layers.storage.kernels import quantise_rows
from tests.layers.test_low_rank_input_kernels import DEVICE, HAS_GPU, by_kernel, interpreted, large
from tests.layers.test_norm_codes import rounded_to_fp8

WIDTHS = [8, 300, 4096, 5000, 20000]
LARGE = [pytest.param(width, marks=large) for width in (12288, 36864, 49152, 50000, WIDEST)]
pytestmark = by_kernel


@pytest.fixture(autouse=True)
def somewhere() -> Iterator[None]:
    with contextlib.ExitStack() as patches:
        for patch in () if HAS_GPU else (*interpreted(), rounded_to_fp8()):
            patches.enter_context(patch)
        yield


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantised(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of values [m, k] in fp32, rounded to bf16."""
    rounded = values.bfloat16().float()
    scale = scale_of(rounded.abs().amax(1, keepdim=True))
    return to_fp8(rounded, scale), scale


def same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> bool:
    """Signs of zeros aside."""
    return all(torch.equal(g.cpu().float(), w.float()) for g, w in zip(got, want, strict=True))


def on(device: str, *tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


@pytest.mark.parametrize("width", WIDTHS + LARGE)
@pytest.mark.parametrize("scaled", [False, True])
def test_rows_to_the_bit(width: int, scaled: bool) -> None:
    x, factor = random(3, width).bfloat16(), random(width, seed=1).abs() + 0.1 if scaled else None
    x[1] = 0
    x[0, -1] = 1e3  # the largest at the very end
    want = quantised(x.float() if factor is None else x.float() * factor)
    assert same(quantise_rows(*on(DEVICE, x, factor)), want)
    agreed = quantise_rows(*on(DEVICE, x, factor), agree=lambda largest: None)
    assert same(agreed, want)


@pytest.mark.parametrize("width", [8, 300, 20000, *LARGE[:3]])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("given", [False, True], ids=["alone", "with bias and factor"])
def test_activations(width: int, gated: bool, name: str, given: bool) -> None:
    """ReLU's to the bit, where no rounding of a function comes in between; the others' but for a few that fall the
    other way."""
    activation, wide = Activation(name, gated), 2 * width if gated else width
    x, grad = random(3, wide).bfloat16(), random(3, width, seed=2).bfloat16()
    bias = random(wide, seed=3).bfloat16() if given else None
    over, under = (random(n, seed=4).abs() + 0.1 if given else None for n in (width, wide))
    y, dx = activation.exactly(x, bias), activation.exact_gradient(x, bias, grad)
    got = [held_activation.activate(*on(DEVICE, x, bias, over), name, gated=gated)]
    want = [quantised(y if over is None else y * over)]
    if can_hold(x, wide):
        got.append(held_activation.activate_gradient(*on(DEVICE, x, bias, grad, under), name, gated=gated))
        want.append(quantised(dx if under is None else dx * under))
    # Read twice, as where ranks agree on the scale, it is the same.
    agreed = {"gated": gated, "agree": lambda largest: None}
    got.append(activation_kernels.activate_in_fp8(*on(DEVICE, x, bias, over), name, **agreed)[:2])
    got.append(activation_kernels.activate_gradient_in_fp8(*on(DEVICE, x, bias, grad, under), name, **agreed)[:2])
    want += [want[0], quantised(dx if under is None else dx * under)]
    for ours, theirs in zip(got, want, strict=True):
        if name == "relu":
            assert same(ours, theirs)
        torch.testing.assert_close(ours[1].cpu(), theirs[1], rtol=2**-7, atol=0)  # of one rounding to bf16
        ours_f, theirs_f = (codes.cpu().float() * scale.cpu() for codes, scale in (ours, theirs))
        assert float((ours_f - theirs_f).norm() / theirs_f.norm()) < 0.01


def test_what_cannot_be_held_is_not() -> None:
    assert can_hold(torch.empty(1, 8, dtype=torch.bfloat16), WIDEST)
    assert not can_hold(torch.empty(1, 8, dtype=torch.bfloat16), WIDEST + 1)
    assert not can_hold(torch.empty(1, 8), 8)

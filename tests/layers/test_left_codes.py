# SPDX-License-Identifier: Apache-2.0
"""Codes that are left beside a tensor are found by the product that reads it, if it reads just that; else it quantises.

Here a CPU leaves codes of ones beside other numbers, so that whoever takes them is seen.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_megatron.layers.frozen import frozen_linear
from lora_megatron.layers.low_rank import Update, add_low_rank
from lora_megatron.layers.low_rank_input import low_rank_input
from lora_megatron.layers.qkv import whole
from lora_megatron.layers.storage.choose import StorageFormat
from lora_megatron.layers.storage.fp8 import Fp8Products, quantise_tokens
from lora_megatron.layers.storage.left_codes import Quantised, leave
from lora_megatron.layers.storage.stored import hand_over
from tests.layers.test_low_rank_input_kernels import CPU, DEVICE

ROWS, WIDTH = 6, 16


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ones(y: Tensor) -> Quantised:
    return quantised(torch.ones(y.numel() // y.shape[-1], y.shape[-1]))


def with_ones(y: Tensor) -> Tensor:
    leave(y, ones(y))
    return y


def are_ones(got: Quantised) -> bool:
    return bool((got.codes.float() * got.scale == 1).all())


def quantised(x: Tensor) -> Quantised:
    return quantise_tokens(x, factor=None, group=None)


def frozen_fp8(out_features: int, in_features: int, *, axis: int, device: torch.device = DEVICE) -> Tensor:
    """The handle of a stored weight."""
    module = nn.Linear(in_features, out_features, bias=False, dtype=torch.bfloat16, device=device)
    values = random(out_features, in_features, seed=9).to(device)
    stored = StorageFormat("fp8").make(out_features, in_features, device=device, axis=axis, group=None)
    stored.store(values)
    hand_over(module, stored)
    return module.weight


def test_they_are_taken_once() -> None:
    y = with_ones(random(3, 2, WIDTH))
    assert are_ones(quantised(y.reshape(-1, WIDTH)))
    assert not are_ones(quantised(y.reshape(-1, WIDTH)))


class AsItIs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda y: y.view(-1, WIDTH),
    "a view of a view": lambda y: y.view(-1).view(2, -1, WIDTH),
    "handed on by a function": lambda y: AsItIs.apply(y.requires_grad_()),
    "detached": lambda y: y.detach(),
    "a view of its own": lambda y: torch.ops.aten._unsafe_view(y, y.shape),
    "transposed twice": lambda y: y.transpose(0, 1).transpose(0, 1),
}


@pytest.mark.parametrize("way", SAME)
def test_they_are_found_through(way: str) -> None:
    y = with_ones(random(3, 2, WIDTH))
    assert are_ones(quantised(SAME[way](y).reshape(-1, WIDTH)))


def changed(y: Tensor, change: Callable[[Tensor], object]) -> Tensor:
    change(y)
    return y


def changed_by_view_of_its_own(y: Tensor) -> Tensor:
    return torch.ops.aten._unsafe_view(y, y.shape).add_(1)


def gone(y: Tensor) -> Tensor:
    """A view of its own of a y that nobody holds any more: whether it was changed cannot be told."""
    return torch.ops.aten._unsafe_view(with_ones(y * 1), y.shape)


OTHER: dict[str, Callable[[Tensor], Tensor]] = {
    "changed": lambda y: changed(y, lambda t: t.mul_(2)),
    "one row changed": lambda y: changed(y, lambda t: t[1].zero_()),
    "changed through a view": lambda y: changed(y, lambda t: t.view(-1)[3:5].add_(1)),
    "written over": lambda y: changed(y, lambda t: torch.neg(t, out=t)),
    "changed, read by a view of its own": lambda y: torch.ops.aten._unsafe_view(y.mul_(2), y.shape),
    "changed by a view of its own": changed_by_view_of_its_own,
    "y is gone": gone,
    "copied": lambda y: y.clone(),
    "scaled": lambda y: y * 1,
    "a part": lambda y: y[1:],
    "the first rows": lambda y: y[:2],
    "as wider rows": lambda y: y.view(-1, 2 * WIDTH),
    "another order": lambda y: y.view(ROWS, WIDTH).flip(0),
    "transposed": lambda y: y.view(2, 3, WIDTH).transpose(0, 1),
    "other numbers of the same bits": lambda y: y.view(torch.int32).view(torch.float16),
    "repeated": lambda y: y.view(-1)[:WIDTH].expand(ROWS, WIDTH),
}


@pytest.mark.parametrize("way", OTHER)
def test_what_is_read_is_quantised_where_it_is(way: str) -> None:
    y = with_ones(random(3, 2, WIDTH))
    x = OTHER[way](y)
    rows = x.reshape(-1, x.shape[-1]) if x.is_contiguous() else x.flatten(0, -2)
    want = quantise_tokens(rows.clone(), factor=None, group=None)
    got = quantised(rows)
    assert torch.equal(got.codes.view(torch.uint8), want.codes.view(torch.uint8))
    assert torch.equal(got.scale, want.scale)
    if rows.untyped_storage().data_ptr() == y.untyped_storage().data_ptr():
        assert not vars(y.untyped_storage()), "what is of no use is not kept"


def test_another_factor_than_none_is_not_what_they_are_of() -> None:
    y = with_ones(random(ROWS, WIDTH))
    assert not are_ones(quantise_tokens(y, factor=torch.ones(WIDTH), group=None))


def test_where_nobody_counts_changes_none_are_left() -> None:
    with torch.inference_mode():
        y = with_ones(random(ROWS, WIDTH))
        assert not vars(y.untyped_storage())
        assert not are_ones(quantised(y))


@pytest.mark.parametrize("end", ["nobody reads y", "taken", "taken, y stays", "left, but y was changed"])
def test_nothing_lives_longer(end: str) -> None:
    """At once, by counts of references."""
    gc.disable()
    try:
        y = random(ROWS, WIDTH)
        room = ones(y)
        leave(y, room)
        codes, memory, tensor = (weakref.ref(t) for t in (room.codes, y.untyped_storage(), y))
        del room
        assert codes() is not None
        if end.startswith("taken"):
            assert quantised(y).codes is codes()
        if end == "left, but y was changed":
            quantised(y.add_(1))
        if end in ("nobody reads y", "taken"):
            del y
            assert tensor() is None
            assert memory() is None
        assert codes() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_a_column_layer_takes_what_its_norm_left(adapted: bool) -> None:
    weight, y = frozen_fp8(8, WIDTH, axis=0, device=CPU), random(3, 2, WIDTH).requires_grad_() * 1
    want = frozen_linear(torch.ones(3, 2, WIDTH), weight)
    leave(y, ones(y))
    x = low_rank_input(y, [nn.Parameter(random(2, WIDTH))], None)[1] if adapted else y
    assert x is not y or not adapted
    assert torch.equal(frozen_linear(x, weight), want)


class GradientWithOnes(torch.autograd.Function):
    """What the norm after the residual does."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h * 1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return with_ones(grads[0] * 1)


@pytest.mark.parametrize("changes", [False, True], ids=["as it is", "changed on its way"])
@pytest.mark.parametrize("way", ["the residual", "bias and update", "update by the layer"])
def test_a_row_layer_takes_what_was_left_of_its_outputs_gradient(way: str, changes: bool) -> None:
    weight = frozen_fp8(WIDTH, 8, axis=1, device=CPU)
    stored: Any = weight.stored
    assert isinstance(stored, Fp8Products)
    x, residual = random(3, 2, 8).requires_grad_(), random(3, 2, WIDTH, seed=2).requires_grad_()
    y = frozen_linear(x, weight)
    update = Update(whole("o", WIDTH), (1.7,), random(3, 2, 4), (nn.Parameter(random(WIDTH, 4)),))
    if way == "the residual":
        h = y + residual
    elif way == "bias and update":
        h = add_low_rank(y, update, residual=residual, bias=random(WIDTH))
    else:
        h = add_low_rank(y, update) + residual
    if changes:
        h.register_hook(lambda grad: grad.mul_(2))
    back = random(3, 2, WIDTH, seed=3)
    GradientWithOnes.apply(h).backward(back)
    rows = (2 * back if changes else torch.ones_like(back)).view(-1, WIDTH)
    assert x.grad is not None
    assert torch.equal(x.grad.view(-1, 8), stored.input_gradient(rows))

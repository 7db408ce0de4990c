# SPDX-License-Identifier: Apache-2.0
"""Rotary positions against megatron-core's own, forward and gradient, and what is kept of them."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from torch import Tensor

from lora_megatron.layers.rotary import turn, turned


def angles_of(rows: int, rotary: int) -> Tensor:
    half = torch.rand(12, rows, 1, rotary // 2, generator=torch.Generator().manual_seed(1)) * 50
    return torch.cat((half, half), -1)


@pytest.mark.parametrize("rows", [1, 3], ids=["angles shared", "angles of each row"])
@pytest.mark.parametrize("rotary", [16, 6])
def test_megatron_turns_the_same_way(rotary: int, rows: int) -> None:
    x = torch.randn(12, 3, 5, 16, dtype=torch.float64)
    angles, grad = angles_of(rows, rotary).double(), torch.randn(12, 3, 5, 16, dtype=torch.float64)
    results = []
    for function in (turn, _apply_rotary_pos_emb_bshd):
        leaf = x.clone().requires_grad_()
        y = function(leaf, angles)
        results.append((y, *torch.autograd.grad(y, leaf, grad)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_gradient_is_what_differences_say() -> None:
    x = torch.randn(4, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: turn(x, angles_of(1, 6)[:4].double()), x)


def test_turning_back_undoes_turning_and_keeps_the_rest() -> None:
    x = torch.randn(12, 3, 5, 16)
    there = turned(x, angles_of(1, 8))
    torch.testing.assert_close(turned(there, angles_of(1, 8), back=True), x)
    assert torch.equal(there[..., 8:], x[..., 8:])
    assert not torch.allclose(there[..., :8], x[..., :8], atol=0.1)


def test_nothing_but_the_angles_is_kept() -> None:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    angles = angles_of(1, 16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        turn(torch.randn(12, 3, 5, 16, requires_grad=True), angles)
    assert [tensor.data_ptr() for tensor in kept] == [angles.data_ptr()]


def test_bf16_is_rounded_once() -> None:
    x, angles = torch.randn(12, 3, 5, 16).bfloat16(), angles_of(1, 16)
    exact = turned(x.double(), angles.double())
    assert torch.equal(turned(x, angles), exact.bfloat16())

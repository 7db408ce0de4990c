# SPDX-License-Identifier: Apache-2.0
"""Rotary positions against megatron-core's own, forward and gradient, and what is kept of them."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn

from lora_megatron.layers.adapted_attention import AdaptedAttention
from lora_megatron.layers.rotary import RotaryAttention, turn, turned


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


def test_heads_in_groups_are_copied_out_of_them() -> None:
    """q of a fused output, between whose groups k and v lie: as a copy of its heads is turned, and its gradient."""
    fused = torch.randn(12, 3, 2, (3 + 2) * 16, dtype=torch.float64, requires_grad=True)
    angles, grad = angles_of(1, 16).double(), torch.randn(12, 3, 6, 16, dtype=torch.float64)
    views = (fused[..., :48].unflatten(-1, (3, 16)), fused[..., :48].reshape(12, 3, 6, 16))
    grouped, apart = (turn(query, angles) for query in views)
    assert torch.equal(grouped, apart)
    assert torch.equal(*(torch.autograd.grad(y, fused, grad)[0] for y in (grouped, apart)))


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
    x = torch.randn(12, 3, 5, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    angles = angles_of(1, 16)
    exact = turned(x.double(), angles.double())
    half_a_step = torch.exp2(exact.abs().log2().floor() - 8)
    slack = 1e-3 * half_a_step + 1e-6  # fp32 in between now and then falls on the other side of a middle
    assert ((turned(x, angles).double() - exact).abs() <= half_a_step + slack).all()
    in_bf16 = turned(x, angles.bfloat16().float())
    assert ((in_bf16.double() - exact).abs() > half_a_step + slack).any(), "angles in bf16 would be noticed"


def attention_with(norm: nn.Module | None) -> RotaryAttention:
    """Without weights: what megatron-core computes is patched."""
    attention = RotaryAttention.__new__(RotaryAttention)
    nn.Module.__init__(attention)
    attention.q_layernorm = norm
    return attention


def fused(attention: RotaryAttention, angles: Tensor, *, trained: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v, the tensor of which megatron-core gave all three as views), inside a forward with these angles."""
    with torch.enable_grad():
        whole = torch.randn(12, 3, 15, 16, generator=torch.Generator().manual_seed(2)).requires_grad_(trained) * 1
        views = whole.split(5, 2)

    def forward(self: RotaryAttention, hidden: Tensor, mask: None, *, rotary_pos_emb: None) -> tuple[Tensor, ...]:
        assert rotary_pos_emb is None, "megatron-core would turn again"
        return self.get_query_key_value_tensors()

    with (
        patch.object(SelfAttention, "forward", forward),
        patch.object(AdaptedAttention, "get_query_key_value_tensors", lambda self: views),
    ):
        query, key, value = attention(torch.empty(0), None, rotary_pos_emb=angles)
    assert torch.equal(query, turned(views[0], angles))
    assert torch.equal(key, turned(views[1], angles))
    assert torch.equal(value, views[2])
    assert attention._angles is None
    return query, key, value, whole


@pytest.mark.parametrize("norm", [None, IdentityOp()], ids=["megatron-core 0.19", "megatron-core 0.16"])
def test_v_is_copied_exactly_where_a_view_would_keep_q_and_k(norm: nn.Module | None) -> None:
    attention, angles = attention_with(norm), angles_of(1, 16)

    def is_copy(value: Tensor, whole: Tensor) -> bool:
        return value.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()

    _, _, value, whole = fused(attention, angles)
    assert is_copy(value, whole)
    assert value.is_contiguous()
    (grad,) = torch.autograd.grad(value.sum(), whole)
    assert torch.equal(grad[..., :10, :], torch.zeros(12, 3, 10, 16))
    assert torch.equal(grad[..., 10:, :], torch.ones(12, 3, 5, 16))
    assert not is_copy(*fused(attention, angles, trained=False)[2:]), "nothing is kept for a gradient"
    with torch.no_grad():
        assert not is_copy(*fused(attention, angles)[2:])
    assert not is_copy(*fused(attention_with(nn.LayerNorm(16)), angles)[2:]), "the norm keeps the fused tensor anyway"


def test_a_forward_that_raised_leaves_no_angles() -> None:
    attention, angles, seen = attention_with(None), angles_of(1, 16), []

    def forward(self: RotaryAttention, *_: object, **__: object) -> None:
        seen.append(self._angles)
        raise RuntimeError("no memory")

    with patch.object(SelfAttention, "forward", forward), pytest.raises(RuntimeError, match="no memory"):
        attention(torch.empty(0), None, rotary_pos_emb=angles)
    assert seen == [angles], "there while it ran"
    assert attention._angles is None

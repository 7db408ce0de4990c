# SPDX-License-Identifier: Apache-2.0
"""Queries and keys turned by their positions (Su et al. 2021), keeping nothing but the angles.

    first' = first cos(a) - second sin(a)        first, second: the two halves of a head's first `rotary` dimensions,
    second' = second cos(a) + first sin(a)       a = position * f_i of pair i (`layers.rope`); other dimensions stay

The gradient is turned back by the same angles: neither the unturned tensor nor cos and sin are needed for it. Computed
in fp32 and rounded once. On a GPU with Triton it is one pass over the tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from lora_megatron.layers.adapted_attention import AdaptedAttention

try:
    from lora_megatron.layers import rotary_kernels as kernels
except ImportError:  # no Triton: the same numbers, from more passes
    kernels = None  # type: ignore[assignment]


def turned(x: Tensor, angles: Tensor, *, back: bool = False) -> Tensor:
    """x [s, b, heads, d], or [s, b, groups, heads of a group, d], turned by angles fp32 [s, b or 1, 1, rotary], whose
    halves are alike -> [s, b, heads, d]; no gradient."""
    if kernels is not None and x.is_cuda and x.dtype != torch.float64:
        return kernels.turn(x, angles, back=back)
    x = x.flatten(2, -2)
    rotary = angles.shape[-1]
    values = x[..., :rotary].to(torch.promote_types(x.dtype, torch.float32))
    first, second = values.chunk(2, -1)
    half = angles[..., : rotary // 2].to(values.dtype)
    cos, sin = half.cos(), half.sin() * (-1.0 if back else 1.0)
    pairs = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return torch.cat((pairs.to(x.dtype), x[..., rotary:]), -1)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor) -> Tensor:
        ctx.save_for_backward(angles)
        ctx.shape = x.shape
        return turned(x, angles)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (angles,) = ctx.saved_tensors
        return turned(grads[0], angles, back=True).view(ctx.shape), None


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """As `turned`, with its gradient."""
    result: Tensor = _Turn.apply(x, angles)
    return result


class RotaryAttention(AdaptedAttention):
    """megatron-core's attention; q and k are turned here, before it looks at them, and not by it."""

    _angles: Tensor | None = None

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, *args: Any, rotary_pos_emb: Any = None, **rest: Any
    ) -> Any:
        """As megatron-core's; `rotary_pos_emb` are the angles [s, b or 1, 1, rotary]."""
        self._angles = rotary_pos_emb
        try:
            return super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=None, **rest)
        finally:
            self._angles = None

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """q [s, b, heads, d], k and v [s, b, groups, d]."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        if self._angles is None:
            return query, key, value
        normed = not isinstance(self.q_layernorm, IdentityOp | None)
        if not normed and torch.is_grad_enabled() and value.requires_grad:
            # A view would keep all of the fused output, of which nobody needs q and k any more.
            value = value.clone(memory_format=torch.contiguous_format)
        return turn(query, self._angles), turn(key, self._angles), value

    def heads_of(self, query: Tensor) -> Tensor:
        """As it is where it is about to be turned, which copies it out of the groups by the way."""
        if self._angles is None:
            return super().heads_of(query)
        return query.unflatten(-1, (-1, self.hidden_size_per_attention_head))

# SPDX-License-Identifier: Apache-2.0
"""Self-attention whose q, k and v come from an adapted fused layer: update, split, and one pass backward.

forward     fused += s u B^T of each adapted part;  q, k, v = views of fused            (`low_rank`, `qkv`)
backward    g = [dq dk dv], interleaved as fused;  du = s g[:, part] B,  dB = s g[:, part]^T u

Left to autograd, g is put together in one pass and read again for du and dB in another. Here a kernel takes these
while it puts g together.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn

from lora_megatron.layers.column import LoraColumnParallelLinear
from lora_megatron.layers.low_rank import Update
from lora_megatron.layers.qkv import Part


class _UpdateAndSplit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        fused: Tensor,
        all_parts: tuple[Part, ...],
        parts: tuple[Part, ...],
        scales: tuple[float, ...],
        aside: bool,
        added: slice | None,
        u: Tensor,
        *bs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.all_parts, ctx.parts, ctx.scales, ctx.aside = all_parts, parts, scales, aside
        ctx.bs = bs  # the parameters themselves, for their `main_grad`
        ctx.save_for_backward(u, *bs)  # b for autograd to notice if it changes before the backward pass
        Update(parts, scales, u, bs, added=added).add_to(fused.view(-1, fused.shape[-1]))
        return tuple(part.of(fused) for part in all_parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        update = Update(ctx.parts, ctx.scales, ctx.saved_tensors[0], ctx.bs, ctx.aside)
        flat = [grad.reshape(-1, part.rows) for grad, part in zip(grads, ctx.all_parts, strict=True)]
        grad, du, dbs = update.gradients_of_parts(flat, ctx.all_parts)
        return grad.view(*grads[0].shape[:-2], -1), None, None, None, None, None, du, *dbs


def update_and_split(fused: Tensor, update: Update, parts: tuple[Part, ...]) -> tuple[Tensor, ...]:
    """Every part [..., groups, stop - start] of fused [..., groups * stride] with the update added.

    parts: all that `fused` consists of, adapted or not, in their order. They are views of `fused`, which is written
    over: nothing else may read it, or keep it for its backward pass.
    """
    assert sum(part.stop - part.start for part in parts) == parts[0].stride, "a gradient would have holes"
    assert update.parts == tuple(part for part in parts if part in update.parts), (
        "columns of u are counted in their order"
    )
    # A view that nobody else holds, as in `low_rank.add_low_rank`.
    alone = torch.ops.aten._unsafe_view(fused, fused.shape)
    how = parts, update.parts, update.scales, update.aside, update.added
    result: tuple[Tensor, ...] = _UpdateAndSplit.apply(alone, *how, update.u, *update.bs)
    return result


class AdaptedAttention(SelfAttention):
    """megatron-core's self-attention; where q, k or v has an adapter, split as above."""

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> Any:
        """q [s, b, heads, d], k and v [s, b, groups, d], and what else megatron-core's gives when asked."""
        linear = self.linear_qkv
        if output_gate or not split_qkv or not self._is_plain(linear):
            return super().get_query_key_value_tensors(hidden_states, key_value_states, output_gate, split_qkv)
        fused, update = linear(hidden_states, leave_update=True)
        query, key, value = update_and_split(fused, update, tuple(linear.parts.values()))
        return self.heads_of(query), key, value

    def heads_of(self, query: Tensor) -> Tensor:
        """[s, b, groups, heads of a group * d] -> [s, b, heads, d]: a copy, where k and v lie between its groups."""
        return query.reshape(*query.shape[:-2], -1, self.hidden_size_per_attention_head)

    def _is_plain(self, linear: nn.Module) -> bool:
        """Whether nothing but an update stands between the fused output and q, k and v."""
        norms = (self.q_layernorm, self.k_layernorm)
        return (
            torch.is_grad_enabled()
            and isinstance(linear, LoraColumnParallelLinear)
            and bool(linear.adapters)
            and all(isinstance(norm, IdentityOp | None) for norm in norms)
            and self.config.num_query_groups >= self.config.tensor_model_parallel_size  # else groups are gathered
            and not self.config.test_mode
        )

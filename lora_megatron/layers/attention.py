# SPDX-License-Identifier: Apache-2.0
"""torch's scaled dot product attention as megatron-core's core attention.

Heads are this tensor rank's; nothing here crosses ranks. torch picks the kernel (cuDNN, flash, math).
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional


class SdpaAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v, causal unless a mask is given."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **megatron: Any
    ) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **megatron: Any
    ) -> Tensor:
        """q [s, b, heads, d], k and v [t, b, groups, d], mask [b, 1, s, t] True where masked -> [s, b, heads * d].

        Without a mask attention is causal, except for a single query position (cached decoding), which sees all keys.
        """
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads or groups, s, d]
        keep = None if attention_mask is None else ~attention_mask  # SDPA's mask is True where kept
        out = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=keep,
            is_causal=keep is None and query.shape[0] > 1,
            scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.permute(2, 0, 1, 3).flatten(2)  # [s, b, heads * d]

# SPDX-License-Identifier: Apache-2.0
"""torch's scaled dot product attention as megatron-core's core attention.

Heads are this tensor rank's; nothing here crosses ranks. torch picks the kernel (cuDNN, flash, math). A sliding window
that is shorter than the sequence needs a mask, and torch's kernels for masks; a longer one costs nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn
from torch.nn import functional

from lora_megatron.layers.cache import LayerCache, attend


class SdpaAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v, causal unless a mask is given."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **megatron: Any
    ) -> None:
        super().__init__()
        self.scale = softmax_scale
        self.cache: LayerCache | None = None
        """Set while decoding."""
        self.window = 0  # tokens a position sees, itself included; 0 is all
        if config.window_size and is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        ):
            self.window = config.window_size[0] + 1

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **megatron: Any
    ) -> Tensor:
        """q [s, b, heads, d], k and v [t, b, groups, d], mask [b, 1, s, t] True where masked -> [s, b, heads * d].

        Without a mask attention is causal, except for a single query position, which sees all keys. With a cache the
        new positions see those before them too.
        """
        if self.cache is not None:
            assert attention_mask is None
            assert self.cache.span is not None
            keys, values = self.cache.extend(key, value)
            if not self.cache.span.first:
                mask = self.cache.span.mask(self.window, query.dtype)
                return attend(query, keys, values, mask, self.scale)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads or groups, s, d]
        keep = None if attention_mask is None else ~attention_mask  # SDPA's mask is True where kept
        if 0 < self.window < key.shape[0]:
            near = _within(self.window, query.shape[0], key.shape[0], query.device)
            keep = near if keep is None else keep & near
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


def _within(window: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """[s, t] True where a query may see a key: not later than itself, and among the last `window`."""
    places = torch.arange(keys, device=device)
    distance = places[keys - queries :, None] - places[None, :]  # the queries are the last positions
    return (distance >= 0) & (distance < window)

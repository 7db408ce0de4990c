# SPDX-License-Identifier: Apache-2.0
"""Scaled dot product attention as megatron-core's core attention, by torch's kernels or FlashAttention 4's.

Heads are this tensor rank's; nothing here crosses ranks. torch picks its kernel itself (cuDNN, flash, math). A sliding
window that is shorter than the sequence needs a mask, and torch's kernels for masks; a longer one costs nothing.
FlashAttention 4 (the package flash-attn-4) is given what is causal and nothing else: rows without a mask, all of their
positions at once. Both keep q, k, v, the output and a log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn
from torch.nn import functional

from lora_megatron.layers.cache import LayerCache, attend

FLASH_ATTENTION_4 = "fa4"
"""In `SdpaAttention`'s `kernels`."""


class SdpaAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v, causal unless a mask is given."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        softmax_scale: float | None = None,
        *,
        kernels: str = "torch",
        **megatron: Any,
    ) -> None:
        """kernels: `torch`, or `fa4` for what FlashAttention 4 takes, on a GPU."""
        super().__init__()
        self.scale = softmax_scale
        self.kernels = kernels
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
        if attention_mask is None and self._is_for_flash_attention(query, key):
            return _flash_attention(query, key, value, self.scale)
        if self.cache is not None:
            assert attention_mask is None
            assert self.cache.span is not None
            keys, values = self.cache.extend(key, value)
            if not self.cache.span.first:
                mask = self.cache.span.mask(self.window, query.dtype)
                return attend(query, keys, values, mask, self.scale)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads or groups, s, d]
        keep = None if attention_mask is None else ~attention_mask  # SDPA's mask is True where kept
        if self._hides(key.shape[0]):
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

    def _hides(self, keys: int) -> bool:
        """Whether the window hides any of so many keys from the last of them."""
        return 0 < self.window < keys

    def _is_for_flash_attention(self, query: Tensor, key: Tensor) -> bool:
        """Whether attention without a mask is what FlashAttention 4 takes: of a whole row, each position of which sees
        itself and all before it. A cache's first pass is left to torch as well, so that decoding is of one kind."""
        return (
            self.kernels == FLASH_ATTENTION_4
            and query.is_cuda
            and self.cache is None
            and not self._hides(key.shape[0])
            and 1 < query.shape[0] == key.shape[0]
        )


def flash_attention_4() -> Callable[..., Any]:
    """The function of flash-attn-4, imported where it is asked for: a compiler comes with it, which takes seconds.

    Raises:
        ImportError: the package is not here; `flash_attn` alone may be an older FlashAttention.
    """
    from flash_attn.cute.interface import flash_attn_func

    return flash_attn_func


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """As `SdpaAttention.forward`, for as many keys as queries and no mask."""
    function = flash_attention_4()
    views = (x.transpose(0, 1) for x in (query, key, value))  # [b, s, heads or groups, d]
    is_exact = torch.are_deterministic_algorithms_enabled()
    result = function(*views, softmax_scale=scale, causal=True, deterministic=is_exact)
    out: Tensor = result[0] if isinstance(result, tuple) else result  # beside it a log-sum-exp, or nothing
    # The next product reads rows of [s, b]; what was made is [b, s], which is the same for one sample. More are copied,
    # which `planning.activations` counts.
    return out.transpose(0, 1).flatten(2).contiguous()  # [s, b, heads * d]


def _within(window: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """[s, t] True where a query may see a key: not later than itself, and among the last `window`."""
    places = torch.arange(keys, device=device)
    distance = places[keys - queries :, None] - places[None, :]  # the queries are the last positions
    return (distance >= 0) & (distance < window)

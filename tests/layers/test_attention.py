# SPDX-License-Identifier: Apache-2.0
"""torch's attention in megatron-core's shapes against an explicit softmax."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lora_megatron.layers.attention import SdpaAttention


def attention_with(window: int = 0) -> SdpaAttention:
    """Layer 2 of a model in which layers 2 and 4 have the window."""
    sizes = (window - 1, 0) if window else None
    config = SimpleNamespace(window_size=sizes, window_attn_skip_freq=[0, 1, 0, 1])
    return SdpaAttention(config, 2)  # type: ignore[arg-type]


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, masked: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, one batch row, head and position at a time."""
    steps, batch, heads, dim = q.shape
    out = torch.zeros(steps, batch, heads * v.shape[3], dtype=q.dtype)
    for b in range(batch):
        for head in range(heads):
            group = head // (heads // k.shape[2])
            for step in range(steps):
                scores = (k[:, b, group] @ q[step, b, head]) / dim**0.5
                hidden = masked[b, 0, step] if masked is not None else torch.arange(len(k)) > step
                weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), 0)
                out[step, b, head * dim : (head + 1) * dim] = weights @ v[:, b, group]
    return out


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_equals_explicit_softmax(groups: int, packed: bool) -> None:
    generator = torch.Generator().manual_seed(6)
    q = torch.randn(6, 2, 4, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(6, 2, groups, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    segment = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]])
    visible = (segment[:, :, None] == segment[:, None, :]) & torch.ones(6, 6).tril().bool()
    masked = ~visible[:, None] if packed else None
    torch.testing.assert_close(attention_with()(q, k, v, masked), explicit_attention(q, k, v, masked))


@pytest.mark.parametrize("window", [1, 3, 6, 9])
@pytest.mark.parametrize("packed", [False, True])
def test_a_window_hides_what_is_too_far_back(window: int, packed: bool) -> None:
    generator = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(6, 2, 2, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    distance = torch.arange(6)[:, None] - torch.arange(6)[None, :]
    segment = torch.tensor([0, 0, 0, 0, 1, 1])
    causal = (segment[:, None] == segment[None, :]) & (distance >= 0) if packed else distance >= 0
    hidden = (~(causal & (distance < window))).expand(2, 1, 6, 6)
    given = (~causal).expand(2, 1, 6, 6) if packed else None
    torch.testing.assert_close(attention_with(window)(q, k, v, given), explicit_attention(q, k, v, hidden))
    last = slice(5, 6)  # cached decoding: the query is the last position
    decoded = attention_with(window)(q[last], k, v)
    if not packed:
        torch.testing.assert_close(decoded, explicit_attention(q, k, v, hidden)[last])


def test_only_the_chosen_layers_have_a_window() -> None:
    config = SimpleNamespace(window_size=(2, 0), window_attn_skip_freq=[0, 1, 0, 1])
    assert [SdpaAttention(config, layer).window for layer in (1, 2, 3, 4)] == [0, 3, 0, 3]  # type: ignore[arg-type]


def test_a_single_query_sees_every_key() -> None:
    """Cached decoding asks for one position, which comes after all keys."""
    generator = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(s, 1, 2, 4, generator=generator, dtype=torch.float64) for s in (1, 5, 5))
    nothing = torch.zeros(1, 1, 1, 5, dtype=torch.bool)
    torch.testing.assert_close(attention_with()(q, k, v), explicit_attention(q, k, v, nothing))

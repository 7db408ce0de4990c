# SPDX-License-Identifier: Apache-2.0
"""Attention over a cache, position by position, against attention over everything at once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lora_megatron.layers.attention import SdpaAttention
from lora_megatron.layers.cache import LayerCache, Span

LENGTH, BATCH, HEADS, DIM = 70, 3, 4, 8  # longer than the block a cache grows by
CPU = torch.device("cpu")


def attention_with(window: int) -> SdpaAttention:
    config = SimpleNamespace(window_size=(window - 1, 0) if window else None, window_attn_skip_freq=[1])
    attention = SdpaAttention(config, 1)  # type: ignore[arg-type]  # it looks at these two fields alone
    assert attention.window == window
    return attention


def random_qkv(groups: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    q = torch.randn(LENGTH, BATCH, HEADS, DIM, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(LENGTH, BATCH, groups, DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    return q, k, v


def run(attention: SdpaAttention, qkv: tuple[Tensor, Tensor, Tensor], starts: list[int], count: int) -> Tensor:
    """The output [b, count, heads * d] at positions starts .. starts + count of each row."""
    cache = attention.cache
    assert cache is not None
    cache.span = Span(starts, count, CPU)
    rows = torch.arange(len(starts))[:, None]
    q, k, v = (x.transpose(0, 1)[rows, cache.span.positions].transpose(0, 1) for x in qkv)
    return attention(q, k, v).transpose(0, 1)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("count", [1, 2])
def test_rows_of_different_lengths_grow_one_by_one(groups: int, window: int, count: int) -> None:
    qkv = random_qkv(groups)
    attention = attention_with(window)
    whole = attention(*qkv).transpose(0, 1)  # [b, s, heads * d]
    attention.cache = LayerCache()
    lengths = [3, 61, 40]
    first = run(attention, qkv, [0, 0, 0], max(lengths))  # what stands behind a row's own length is padding
    for row, length in enumerate(lengths):
        torch.testing.assert_close(first[row, :length], whole[row, :length])
    for step in range(6):
        starts = [length + step for length in lengths]
        out = run(attention, qkv, starts, count)  # with count 2 the second is padding, overwritten by the next step
        for row, start in enumerate(starts):
            torch.testing.assert_close(out[row, 0], whole[row, start])
    assert attention.cache.keys is not None
    assert attention.cache.keys.shape[2] == 96, "two blocks held 61 positions, and a third the rest"


def test_rows_can_be_exchanged_repeated_and_dropped() -> None:
    qkv = random_qkv(2)
    attention = attention_with(0)
    whole = attention(*qkv).transpose(0, 1)
    attention.cache = LayerCache()
    run(attention, qkv, [0, 0, 0], 9)
    chosen = torch.tensor([2, 0, 2])
    attention.cache.select(chosen)
    out = run(attention, tuple(x[:, chosen] for x in qkv), [9, 9, 9], 1)  # type: ignore[arg-type]
    torch.testing.assert_close(out[:, 0], whole[chosen, 9])


def test_padding_is_never_seen() -> None:
    """Whatever stands behind a row's own length, its outputs are the same to the bit."""
    q, k, v = random_qkv(2)
    outputs = []
    for filler in (0.0, 1e4):
        kk, vv = k.clone(), v.clone()
        kk[3:20, 0] = vv[3:20, 0] = filler
        attention = attention_with(0)
        attention.cache = LayerCache()
        run(attention, (q, kk, vv), [0, 0, 0], 20)
        outputs.append(run(attention, (q, k, v), [3, 20, 20], 1))
    assert torch.equal(outputs[0], outputs[1])

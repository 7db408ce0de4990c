# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the cross-entropy over a cut vocabulary: two passes over logits, and nothing as large in fp32.

    m = max_v z_v     total = sum_v exp(z_v - m)     z_label        over this rank's tokens, v < real
    dz = f exp(z - m) - w 1[v = label]                              over z, rounded once

The first pass reads a row once. Columns that a thread reads in one word share a lane, with a maximum and a sum so far
of its own: it scales its sum where its maximum rises, and waits for no other lane before the row ends. The second pass
computes exp(z - m) again, which takes less time than keeping it in fp32 would.

Padded columns are left out, whatever is in them. Sums are in fp32 and in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_megatron.layers.smoothing import Labels

_STATISTICS, _GRADIENT = (4096, 8), (4096, 8)
"""Columns at a time, and warps, of a program: of one that walks over a row, and of one that has so many columns of a
row alone. With these both need 32 registers a thread for bf16, so that a Hopper GPU's processors are full of threads.
"""
_WORD = 16
"""Bytes that a thread reads at once."""
_LEAST = tl.constexpr(torch.finfo(torch.float32).min)
"""The maximum of no columns: finite, as minus infinity less itself would be no number."""
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp(x):
    """Where fp32 has no normal number for it, 0: a quarter fewer instructions a logit than `tl.exp`."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _lanes(first, P: tl.constexpr, G: tl.constexpr):
    """[P / G, G]: P columns, G of them in a lane."""
    return first + tl.arange(0, P // G)[:, None] * G + tl.arange(0, G)[None, :]


@triton.jit
def _with_piece(maximum, total, z):
    """The lanes' statistics [P / G] with more columns in them, z [P / G, G]."""
    higher = tl.maximum(maximum, tl.max(z, 1))
    return higher, total * _exp(maximum - higher) + tl.sum(_exp(z - higher[:, None]), 1)


@triton.jit
def _loss_statistics(
    logits, column, here, out, columns: tl.constexpr, real: tl.constexpr, P: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """The three numbers of a row."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    z = logits + row * columns
    maximum, total = tl.full([P // G], _LEAST, tl.float32), tl.zeros([P // G], tl.float32)
    whole: tl.constexpr = real // P * P
    for first in range(0, whole, P):
        maximum, total = _with_piece(maximum, total, tl.load(z + _lanes(first, P, G)).to(tl.float32))
    if whole < real:
        # Read as far as `columns`, which as a rule ends with a word: words that `real` cut would be read in bits.
        index = _lanes(whole, P, G)
        last = tl.load(z + index, index < columns, 0.0).to(tl.float32)
        maximum, total = _with_piece(maximum, total, tl.where(index < real, last, float("-inf")))
    highest = tl.max(maximum, 0)
    label, is_here = tl.load(column + row), tl.load(here + row) != 0
    chosen = tl.load(z + label, is_here & (label < real), 0.0).to(tl.float32)
    tl.store(out + row, highest)
    tl.store(out + rows + row, tl.sum(total * _exp(maximum - highest), 0))
    tl.store(out + 2 * rows + row, tl.where(is_here & (label >= real), _LEAST, chosen))


@triton.jit
def _loss_gradient(
    logits, maximum, factor, column, weight, columns: tl.constexpr, real: tl.constexpr, P: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """P columns of a row."""
    pieces: tl.constexpr = (columns + P - 1) // P
    row = tl.program_id(0).to(tl.int64) // pieces
    index = _lanes(tl.program_id(0) % pieces * P, P, G)
    where, inside = logits + row * columns + index, index < columns
    z = tl.load(where, inside, 0.0).to(tl.float32)
    value = tl.where(index < real, _exp(z - tl.load(maximum + row)) * tl.load(factor + row), 0.0)
    value = tl.where(index == tl.load(column + row).to(tl.int32), value - tl.load(weight + row), value)
    tl.store(where, value.to(logits.dtype.element_ty), inside)


def statistics(logits: Tensor, labels: Labels, real: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of logits [n, V/t], contiguous, whose columns from `real` are padding: own maximum, own sum, and the
    logit at the label, which is a token, 0 where it is another rank's; [n] each in fp32."""
    assert logits.is_contiguous()
    rows, columns = logits.shape
    out = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    (size, warps), lane = _STATISTICS, _WORD // logits.element_size()
    _loss_statistics[(rows,)](logits, labels.column, labels.here, out, columns, real, size, lane, num_warps=warps)
    return out[0], out[1], out[2]


def write_gradient(logits: Tensor, maximum: Tensor, factor: Tensor, labels: Labels, weight: Tensor, real: int) -> None:
    """factor exp(z - maximum) over the logits z [n, V/t], contiguous; less `weight` at `labels.column`, so that it is 0
    where the label is another rank's; 0 in padding, where no label is. The others are [n] in fp32."""
    assert logits.is_contiguous()
    rows, columns = logits.shape
    (size, warps), lane = _GRADIENT, _WORD // logits.element_size()
    _loss_gradient[(rows * triton.cdiv(columns, size),)](
        logits, maximum, factor, labels.column, weight, columns, real, size, lane, num_warps=warps
    )

# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the backward pass of u = x A^T; `low_rank_input` has the same in plain torch.

    dA = du^T x, x = norm(h)     h is read, normed and multiplied tile by tile: x is never written
    dx += du A                   dx is read once and written once

All adapters of a layer, three at most, share each launch. Their ranks are counted through: rank j of them all, a column
of du, is row j - first of a factor, of which there are three places and `second` and `third` the first rank of the
latter two. Sums are fp32; those over tokens are added up in a fixed order, by `addend_kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_megatron.layers import low_rank_input_tiles as tiles
from lora_megatron.layers.addend_kernels import sum_addends, three
from lora_megatron.layers.low_rank_tiles import padded
from lora_megatron.layers.norm import NormedRows

TYPES = torch.float32, torch.bfloat16, torch.float16


@triton.jit
def _rows_of(a, j, begin, end, width, column, own):
    """A factor [end - begin, width] where its ranks are among all: [K, C], zeros elsewhere."""
    where = (j - begin)[:, None].to(tl.int64) * width + column[None, :]
    return tl.load(a + where, ((j >= begin) & (j < end))[:, None] & own[None, :], 0.0)


@triton.jit
def stacked(a0, a1, a2, j, second, third, ranks, width, column, own, FACTORS: tl.constexpr):
    """All factors, one below the other: [K, C]."""
    rows = _rows_of(a0, j, 0, second, width, column, own)
    if FACTORS > 1:
        rows += _rows_of(a1, j, second, third, width, column, own)
    if FACTORS > 2:
        rows += _rows_of(a2, j, third, ranks, width, column, own)
    return rows


@triton.jit
def add_input_product(
    out, du, a0, a1, a2, tokens, width, ranks, second, third,
    span: tl.constexpr, K: tl.constexpr, T: tl.constexpr, C: tl.constexpr, FACTORS: tl.constexpr,
):  # fmt: skip
    """out[token, column] += du[token] . A[:, column]; a program has C columns and walks over `span` tokens."""
    column, j = tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, K)
    own = column < width
    right = stacked(a0, a1, a2, j, second, third, ranks, width, column, own, FACTORS)
    for step in range(0, span, T):
        token = tl.program_id(1).to(tl.int64) * span + step + tl.arange(0, T)
        known = (token[:, None] < tokens) & (j[None, :] < ranks)
        left = tl.load(du + token[:, None] * ranks + j[None, :], known, 0.0)
        where, inside = token[:, None] * width + column[None, :], (token[:, None] < tokens) & own[None, :]
        value = tl.load(out + where, inside, 0.0).to(tl.float32) + tl.dot(left, right, input_precision="ieee")
        tl.store(out + where, value.to(out.dtype.element_ty), inside)


@triton.jit
def normed_factor_gradients(
    h, weight, bias, statistics, du, addends, tokens, width, ranks, second, third, pieces,
    span: tl.constexpr, K: tl.constexpr, T: tl.constexpr, C: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """Addends of dA, by spans of tokens. Each tile of x has the bits that `norm_kernels._norm` writes."""
    piece = tl.program_id(1).to(tl.int64)
    column, j = tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, K)
    own = column < width
    w = tl.load(weight + column, own, 0.0).to(tl.float32)
    if CENTRED:
        b = tl.load(bias + column, own, 0.0).to(tl.float32)
    total = tl.zeros([K, C], tl.float32)
    for step in range(0, span, T):
        token = piece * span + step + tl.arange(0, T)
        inside = (token[:, None] < tokens) & own[None, :]
        x = tl.load(h + token[:, None] * width + column[None, :], inside, 0.0).to(tl.float32)
        inverse = tl.load(statistics + token, token < tokens, 0.0)
        if CENTRED:
            x -= tl.load(statistics + tokens + token, token < tokens, 0.0)[:, None]
            x = (x * inverse[:, None]) * w[None, :] + b[None, :]
        else:
            x = (x * inverse[:, None]).to(h.dtype.element_ty).to(tl.float32) * w[None, :]
        known = (token[:, None] < tokens) & (j[None, :] < ranks)  # where there is no token x is the bias, and du zero
        left = tl.load(du + token[:, None] * ranks + j[None, :], known, 0.0)
        total += tl.dot(tl.trans(left), x.to(h.dtype.element_ty), input_precision="ieee")
    first = tl.where(j < second, 0, tl.where(j < third, second, third))
    r = tl.where(j < second, second, tl.where(j < third, third - second, ranks - third))
    row = first.to(tl.int64) * pieces + piece * r + (j - first)  # of the addends, all as wide as x
    tl.store(addends + row[:, None] * width + column[None, :], total, (j[:, None] < ranks) & own[None, :])


def _ranks(factors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(a.shape[0] for a in factors)


def counted_through(ranks: Sequence[int]) -> tuple[int, int, int]:
    """How many, and the first rank of a second and of a third factor: behind all where there is none."""
    return sum(ranks), ranks[0], sum(ranks[:2])


def can_take(x: Tensor, du: Tensor, factors: Sequence[Tensor]) -> bool:
    """Whether the kernels are to do it; x [..., width] is what is read or added to."""
    return x.is_cuda and made_for(x, du, factors)


def made_for(x: Tensor, du: Tensor, factors: Sequence[Tensor]) -> bool:
    """Whether the kernels are made for such types, for so many factors and for their ranks."""
    if not du.numel() or x.dtype not in TYPES or any(t.dtype != x.dtype for t in (du, *factors)):
        return False
    return all(tiles.tile_of(_ranks(factors), x.element_size(), table) is not None for table in tiles.TABLES)


def add_to_input_gradient(grad_x: Tensor, du: Tensor, factors: Sequence[Tensor]) -> None:
    """grad_x [m, width] += du A in place, from du [m, sum of r] and each A [r, width]; rounded once. All contiguous."""
    assert all(t.is_contiguous() for t in (grad_x, du, *factors))
    ranks, (tokens, width) = _ranks(factors), grad_x.shape
    tile = tiles.tile_of(ranks, grad_x.element_size(), tiles.ADD_TILES)
    assert tile is not None
    add_input_product[(triton.cdiv(width, tile.columns), triton.cdiv(tokens, tile.span))](
        grad_x, du, *three(factors), tokens, width, *counted_through(ranks), tile.span, padded([sum(ranks)]),
        tile.tokens, tile.columns, len(factors), **tile.options,
    )  # fmt: skip


def factor_gradients_of_normed(
    rows: NormedRows, du: Tensor, factors: Sequence[Tensor], mains: Sequence[Tensor] | None
) -> tuple[Tensor, ...]:
    """dA [r, width] of each factor, from du [m, sum of r] and what x [m, width] is the norm of. All contiguous.

    mains: fp32, as large as each A: each gradient is added to its own and none is returned.
    """
    h, weight, bias, statistics = rows
    assert all(t.is_contiguous() for t in (h, du, *(mains or ())))
    ranks, width = _ranks(factors), h.shape[-1]
    tokens = h.numel() // width
    tile = tiles.tile_of(ranks, h.element_size(), tiles.GRADIENT_TILES)
    assert tile is not None
    cut = tiles.addends_of(ranks, tokens, width, tile.span, h.device)
    addends = torch.empty(cut.size, dtype=torch.float32, device=h.device)
    normed_factor_gradients[(triton.cdiv(width, tile.columns), cut.pieces)](
        h, weight, bias, statistics, du, addends, tokens, width, *counted_through(ranks), cut.pieces, tile.span,
        padded([sum(ranks)]), tile.tokens, tile.columns, bias is not None, **tile.options,
    )  # fmt: skip
    return sum_addends(addends, cut.table, cut.longest, None, factors, mains, factor_cut=tiles.SUM)

# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for the low-rank products beside a large one; `low_rank` has the same in plain torch.

A rank-r update of an [m, n] matrix computes next to nothing and moves the matrix through the chip; done with general
matrix products it moves it several times. Here it is read once and written once, and its gradient is read once for
both factors. All projections of a fused output (at most three) share each launch: small kernels cost more to start
than to run.

Columns of a projection lie in a fused output as `groups` runs of `width`, `stride` apart (`qkv.Part`). A program finds
the projection of its tile of columns in a small table that lies on the GPU, one row a projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_megatron.layers import low_rank_tiles as tiles
from lora_megatron.layers.addend_kernels import chosen, sum_addends, three
from lora_megatron.layers.aside import FOR_COPIES
from lora_megatron.layers.qkv import Part

_FIELDS, _SUM_FIELDS = tl.constexpr(tiles.FIELDS), tl.constexpr(tiles.SUM_FIELDS)


@triton.jit
def _which(table, tile):
    """The part (0, 1 or 2) that a tile of columns belongs to."""
    after_first = (tile >= tl.load(table + _FIELDS)).to(tl.int32)
    return after_first + (tile >= tl.load(table + 2 * _FIELDS)).to(tl.int32)


@triton.jit
def _columns(row, index, stride, ALIGNED: tl.constexpr):
    """Where the projection's column `index` lies in the fused output."""
    width, start = tl.multiple_of(tl.load(row + 2), ALIGNED), tl.multiple_of(tl.load(row + 3), ALIGNED)
    return (index // width) * stride + start + index % width


@triton.jit
def _add(
    fused, u, table, b0, b1, b2, scale0, scale1, scale2, tokens, row_size, u_size, stride,
    R: tl.constexpr, T: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """fused[token, column] += scale * u[token] . b[column]"""
    tile = tl.program_id(0)
    which = _which(table, tile)
    row = table + which * _FIELDS
    b, scale = chosen(which, b0, b1, b2), chosen(which, scale0, scale1, scale2)
    n = tl.multiple_of(tl.load(row + 1), ALIGNED)
    r, first = tl.multiple_of(tl.load(row + 4), EVEN), tl.multiple_of(tl.load(row + 5), EVEN)
    token = tl.program_id(1).to(tl.int64) * T + tl.arange(0, T)
    index = (tile - tl.load(row)) * C + tl.arange(0, C)
    rank = tl.arange(0, R)
    known = (token[:, None] < tokens) & (rank[None, :] < r)
    left = tl.load(u + token[:, None] * u_size + first + rank[None, :], known, 0.0)
    right = tl.load(b + index[None, :] * r + rank[:, None], (index[None, :] < n) & (rank[:, None] < r), 0.0)
    delta = tl.dot(left, right, input_precision="ieee") * scale
    column = _columns(row, index, stride, ALIGNED)
    where = token[:, None] * row_size + column[None, :]
    inside = (token[:, None] < tokens) & (index[None, :] < n)
    value = tl.load(fused + where, inside, 0.0).to(tl.float32) + delta
    tl.store(fused + where, value.to(fused.dtype.element_ty), inside)


@triton.jit
def _gradients(
    grad, own0, own1, own2, u, table, sums, addends, b0, b1, b2, scale0, scale1, scale2, tokens, row_size, u_size,
    stride, span: tl.constexpr, R: tl.constexpr, T: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr,
    EVEN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A program has C columns and walks over `span` tokens: its share of those columns' rows of db, and of those
    tokens' du, each an addend of `addend_kernels`. With SPLIT each part's gradient is a matrix of its own, and `grad`
    is filled with them on the way."""
    tile, piece = tl.program_id(0), tl.program_id(1)
    which = _which(table, tile)
    row = table + which * _FIELDS
    b, scale = chosen(which, b0, b1, b2), chosen(which, scale0, scale1, scale2)
    n = tl.multiple_of(tl.load(row + 1), ALIGNED)
    r, first = tl.multiple_of(tl.load(row + 4), EVEN), tl.multiple_of(tl.load(row + 5), EVEN)
    own = tile - tl.load(row)
    du = addends + tl.load(sums + 2 * which * _SUM_FIELDS) + own.to(tl.int64) * tokens * r
    db = addends + tl.load(sums + (2 * which + 1) * _SUM_FIELDS) + piece.to(tl.int64) * n * r
    index = own * C + tl.arange(0, C)
    rank = tl.arange(0, R)
    column = _columns(row, index, stride, ALIGNED)
    right = tl.load(b + index[:, None] * r + rank[None, :], (index[:, None] < n) & (rank[None, :] < r), 0.0)
    source = tl.multiple_of(chosen(which, own0, own1, own2), 16)
    total = tl.zeros([C, R], tl.float32)
    for step in range(0, span, T):
        token = piece * span + step + tl.arange(0, T).to(tl.int64)
        inside = (token[:, None] < tokens) & (index[None, :] < n)
        where = token[:, None] * row_size + column[None, :]
        if SPLIT:
            values = tl.load(source + token[:, None] * n + index[None, :], inside, 0.0)
            tl.store(grad + where, values, inside)
        else:
            values = tl.load(grad + where, inside, 0.0)
        known = (token[:, None] < tokens) & (rank[None, :] < r)
        left = tl.load(u + token[:, None] * u_size + first + rank[None, :], known, 0.0)
        share = tl.dot(values, right, input_precision="ieee") * scale
        tl.store(du + token[:, None] * r + rank[None, :], share, known)
        total += tl.dot(tl.trans(values), left, input_precision="ieee")
    tl.store(db + index[:, None] * r + rank[None, :], total * scale, (index[:, None] < n) & (rank[None, :] < r))


def can_take(bs: Sequence[Tensor]) -> bool:
    """Whether the kernels have tiles for factors of these ranks."""
    return all(tiles.tile_of(bs, table) is not None for table in (tiles.ADD_TILES, tiles.GRADIENT_TILES))


def add_products(
    fused: Tensor, u: Tensor, bs: Sequence[Tensor], parts: tuple[Part, ...], scales: Sequence[float]
) -> None:
    """Add scale u b^T to the columns of each part of `fused`, in place.

    fused [m, groups * stride]; u [m, sum of r]; each b [part.rows, r], all of which the kernels `can_take`; all
    contiguous.
    """
    assert all(t.is_contiguous() for t in (fused, u, *bs))
    tile = tiles.tile_of(bs, tiles.ADD_TILES)
    assert tile is not None
    ranks = tuple(b.shape[1] for b in bs)
    places = tiles.places_of(parts, ranks, tile.columns, fused.device)
    _add[(places.tiles, triton.cdiv(u.shape[0], tile.tokens))](
        fused, u, places.table, *three(bs), *three(scales), u.shape[0], fused.shape[1], u.shape[1], parts[0].stride,
        tiles.padded(ranks), tile.tokens, tile.columns, places.aligned, places.even, num_warps=tile.warps,
    )  # fmt: skip


def product_gradients(
    grad: Tensor,
    u: Tensor,
    bs: Sequence[Tensor],
    parts: tuple[Part, ...],
    scales: Sequence[float],
    mains: Sequence[Tensor] | None = None,
    *,
    aside: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(du [m, sum of r], db [part.rows, r] of each) of `add_products`, from its output's gradient; summed in fp32 in a
    fixed order. All contiguous.

    With `mains`, fp32 and as large as each b, each db is added to its own and none is returned; then, with `aside`, du
    is for an exchange's copies (`layers.aside`).
    """
    assert all(t.is_contiguous() for t in (grad, u, *bs, *(mains or ())))
    return _gradients_of(grad, None, u, bs, tuple(b.shape[1] for b in bs), parts, scales, mains, aside=aside)


def split_gradients(
    grads: Sequence[Tensor],
    u: Tensor,
    bs: Sequence[Tensor | None],
    parts: tuple[Part, ...],
    scales: Sequence[float],
    mains: Sequence[Tensor | None] | None = None,
    *,
    aside: bool = False,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """(the fused output's gradient [m, groups * stride], du, db of each b), where each part has a gradient [m,
    part.rows] of its own: put together in the pass that reads them.

    grads: each beginning at a multiple of 16 bytes.
    bs, scales, mains: as of `product_gradients`, one for each part; a part without an adapter has None, and any scale.
    aside: as there.
    """
    known = [b for b in bs if b is not None]
    assert all(t.is_contiguous() for t in (*grads, u, *known))
    ranks = tuple(0 if b is None else b.shape[1] for b in bs)
    fused = torch.empty(u.shape[0], parts[0].groups * parts[0].stride, dtype=grads[0].dtype, device=u.device)
    filled = [known[0] if b is None else b for b in bs]
    sums = None
    if mains is not None:
        there = next(main for main in mains if main is not None)
        sums = [there if main is None else main for main in mains]
    return fused, *_gradients_of(fused, grads, u, filled, ranks, parts, scales, sums, aside=aside)


def _gradients_of(
    grad: Tensor,
    own: Sequence[Tensor] | None,
    u: Tensor,
    bs: Sequence[Tensor],
    ranks: tuple[int, ...],
    parts: tuple[Part, ...],
    scales: Sequence[float],
    mains: Sequence[Tensor] | None,
    *,
    aside: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Of a fused gradient that is there, or of the parts' `own` ones; what has rank 0 is not looked at."""
    adapted = [b for b, rank in zip(bs, ranks, strict=True) if rank]
    tile = tiles.gradient_tile_of(adapted, parts)
    assert tile is not None
    places = tiles.places_of(parts, ranks, tile.columns, grad.device)
    sums = tiles.sums_of(parts, ranks, places.counts, u.shape[0], tile.tokens, grad.device)
    addends = torch.empty(sums.addends, dtype=torch.float32, device=grad.device)
    _gradients[(places.tiles, sums.pieces)](
        grad, *three([grad] if own is None else own), u, places.table, sums.table, addends, *three(bs), *three(scales),
        u.shape[0], grad.shape[1], u.shape[1], parts[0].stride, sums.span, tiles.padded(ranks), tile.tokens,
        tile.columns, places.aligned, places.even, own is not None, num_warps=tile.warps,
    )  # fmt: skip
    du = torch.empty_like(u)
    cuts = {"cut": tiles.DU_SUM, "factor_cut": tiles.FACTOR_SUM}
    summing = partial(sum_addends, addends, sums.table, sums.longest, du, adapted, mains, **cuts)
    if aside and mains is not None:
        FOR_COPIES.do(summing)
        return du, ()
    return du, summing()

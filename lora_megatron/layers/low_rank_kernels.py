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

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_megatron.layers import low_rank_tiles as tiles
from lora_megatron.layers.qkv import Part

_FIELDS, _SUM_FIELDS = tl.constexpr(tiles.FIELDS), tl.constexpr(tiles.SUM_FIELDS)
_ADDENDS, _PLACES = 16, 512


@triton.jit
def _which(table, tile):
    """The part (0, 1 or 2) that a tile of columns belongs to."""
    after_first = (tile >= tl.load(table + _FIELDS)).to(tl.int32)
    return after_first + (tile >= tl.load(table + 2 * _FIELDS)).to(tl.int32)


@triton.jit
def _of(which, first, second, third):
    """That part's one of three pointers or numbers."""
    chosen = first
    if which == 1:
        chosen = second
    if which == 2:
        chosen = third
    return chosen


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
    b, scale = _of(which, b0, b1, b2), _of(which, scale0, scale1, scale2)
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
    grad, u, table, sums, addends, b0, b1, b2, scale0, scale1, scale2, tokens, row_size, u_size, stride,
    span: tl.constexpr, R: tl.constexpr, T: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A program has C columns and walks over `span` tokens: its share of those columns' rows of db, and of those
    tokens' du, each an addend of `_sum`."""
    tile, piece = tl.program_id(0), tl.program_id(1)
    which = _which(table, tile)
    row = table + which * _FIELDS
    b, scale = _of(which, b0, b1, b2), _of(which, scale0, scale1, scale2)
    n = tl.multiple_of(tl.load(row + 1), ALIGNED)
    r, first = tl.multiple_of(tl.load(row + 4), EVEN), tl.multiple_of(tl.load(row + 5), EVEN)
    own = tile - tl.load(row)
    du = addends + tl.load(sums + 2 * which * _SUM_FIELDS) + own.to(tl.int64) * tokens * r
    db = addends + tl.load(sums + (2 * which + 1) * _SUM_FIELDS) + piece.to(tl.int64) * n * r
    index = own * C + tl.arange(0, C)
    rank = tl.arange(0, R)
    column = _columns(row, index, stride, ALIGNED)
    right = tl.load(b + index[:, None] * r + rank[None, :], (index[:, None] < n) & (rank[None, :] < r), 0.0)
    total = tl.zeros([C, R], tl.float32)
    for step in range(0, span, T):
        token = piece * span + step + tl.arange(0, T).to(tl.int64)
        inside = (token[:, None] < tokens) & (index[None, :] < n)
        values = tl.load(grad + token[:, None] * row_size + column[None, :], inside, 0.0)
        known = (token[:, None] < tokens) & (rank[None, :] < r)
        left = tl.load(u + token[:, None] * u_size + first + rank[None, :], known, 0.0)
        share = tl.dot(values, right, input_precision="ieee") * scale
        tl.store(du + token[:, None] * r + rank[None, :], share, known)
        total += tl.dot(tl.trans(values), left, input_precision="ieee")
    tl.store(db + index[:, None] * r + rank[None, :], total * scale, (index[:, None] < n) & (rank[None, :] < r))


@triton.jit
def _total(addends, row, place, A: tl.constexpr, P: tl.constexpr):
    """Of the addends of P places, A at a time: [P]."""
    count, length = tl.load(row + 1), tl.load(row + 2)
    base = addends + tl.load(row) + place[None, :]
    total = tl.zeros([P], tl.float32)
    for start in range(0, count, A):
        index = start + tl.arange(0, A).to(tl.int64)
        inside = (index[:, None] < count) & (place[None, :] < length)
        total += tl.sum(tl.load(base + index[:, None] * length, inside, 0.0), 0)
    return total


@triton.jit
def _sum(
    addends, table, du, dbs, main0, main1, main2, ADD: tl.constexpr, A: tl.constexpr, P: tl.constexpr,
    FACTOR_A: tl.constexpr, FACTOR_P: tl.constexpr,
):  # fmt: skip
    """P places of one sum, over its addends in a fixed order, A at a time; every other sum is a du, the rest are cut
    their own way. With ADD a db is added to what its part's `main` holds, otherwise written to its place in `dbs`."""
    row = table + tl.program_id(1) * _SUM_FIELDS
    length, r, pitch = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    if tl.program_id(1) % 2 == 0:
        place = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
        if tl.program_id(0).to(tl.int64) * P < length:
            total = _total(addends, row, place, A, P)
            where = (place // r) * pitch + tl.load(row + 5) + place % r
            tl.store(du + where, total.to(du.dtype.element_ty), place < length)
    else:  # under names of their own: a name has one shape in both branches
        own = tl.program_id(0).to(tl.int64) * FACTOR_P + tl.arange(0, FACTOR_P)
        if tl.program_id(0).to(tl.int64) * FACTOR_P < length:
            gradient = _total(addends, row, own, FACTOR_A, FACTOR_P)
            if ADD:
                out = _of(tl.program_id(1) // 2, main0, main1, main2) + own
                tl.store(out, tl.load(out, own < length, 0.0) + gradient, own < length)
            else:
                there = (own // r) * pitch + tl.load(row + 5) + own % r
                tl.store(dbs + there, gradient.to(dbs.dtype.element_ty), own < length)


def can_take(bs: Sequence[Tensor]) -> bool:
    """Whether the kernels have tiles for factors of these ranks."""
    return all(tiles.tile_of(bs, table) is not None for table in (tiles.ADD_TILES, tiles.GRADIENT_TILES))


def _three(values: Sequence[object]) -> list[object]:
    """One for each part a kernel can have; those beyond are not looked at."""
    return [*values, *[values[0]] * (tiles.MOST_PARTS - len(values))]


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
        fused, u, places.table, *_three(bs), *_three(scales), u.shape[0], fused.shape[1], u.shape[1], parts[0].stride,
        tiles.padded(ranks), tile.tokens, tile.columns, places.aligned, places.even, num_warps=tile.warps,
    )  # fmt: skip


def product_gradients(
    grad: Tensor,
    u: Tensor,
    bs: Sequence[Tensor],
    parts: tuple[Part, ...],
    scales: Sequence[float],
    mains: Sequence[Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(du [m, sum of r], db [part.rows, r] of each) of `add_products`, from its output's gradient; summed in fp32 in a
    fixed order. All contiguous.

    With `mains`, fp32 and as large as each b, each db is added to its own and none is returned.
    """
    assert all(t.is_contiguous() for t in (grad, u, *bs, *(mains or ())))
    tile = tiles.tile_of(bs, tiles.GRADIENT_TILES)
    assert tile is not None
    ranks = tuple(b.shape[1] for b in bs)
    places = tiles.places_of(parts, ranks, tile.columns, grad.device)
    sums = tiles.sums_of(parts, ranks, places.counts, u.shape[0], tile.tokens, grad.device)
    addends = torch.empty(sums.addends, dtype=torch.float32, device=grad.device)
    _gradients[(places.tiles, sums.pieces)](
        grad, u, places.table, sums.table, addends, *_three(bs), *_three(scales), u.shape[0], grad.shape[1], u.shape[1],
        parts[0].stride, sums.span, tiles.padded(ranks), tile.tokens, tile.columns, places.aligned, places.even,
        num_warps=tile.warps,
    )  # fmt: skip
    du = torch.empty_like(u)
    return du, sum_addends(addends, sums.table, sums.longest, du, bs, mains)


def sum_addends(
    addends: Tensor,
    table: Tensor,
    longest: int,
    du: Tensor | None,
    factors: Sequence[Tensor],
    mains: Sequence[Tensor] | None,
    *,
    cut: tuple[int, int] = (_ADDENDS, _PLACES),
    factor_cut: tuple[int, int] = (_ADDENDS, _PLACES),
) -> tuple[Tensor, ...]:
    """Fill du, where there is one, and return the gradient of each factor, unless all are added to `mains`; `table` as
    in `low_rank_tiles.Sums`, with two sums a factor, of which the longest has so many places.

    cut, factor_cut: how many addends a program takes at a time, of how many places; of a du, and of a factor.
    """
    of_du = 0 if du is None else triton.cdiv(du.numel(), cut[1])
    summing = _sum[(max(of_du, triton.cdiv(longest, factor_cut[1])), table.shape[0])]
    if mains is not None:
        summing(addends, table, factors[0] if du is None else du, factors[0], *_three(mains), True, *cut, *factor_cut)
        return ()
    found = torch.empty(sum(f.numel() for f in factors), dtype=factors[0].dtype, device=addends.device)
    summing(addends, table, found if du is None else du, found, *_three([found]), False, *cut, *factor_cut)
    pieces = found.split([f.numel() for f in factors])
    return tuple(piece.view(f.shape) for piece, f in zip(pieces, factors, strict=True))


def sum_into(out: Tensor, addends: Tensor, table: Tensor, longest: int, *, cut: tuple[int, int]) -> None:
    """Fill `out` with the one sum of a table with one row; the rest as in `sum_addends`."""
    assert table.shape[0] == 1
    _sum[(triton.cdiv(longest, cut[1]), 1)](addends, table, out, out, *_three([out]), False, *cut, *cut)

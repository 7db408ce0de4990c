# SPDX-License-Identifier: Apache-2.0
"""Triton kernels that add up what programs found of a sum each: the gradients of low-rank products.

A program that sees a few tokens and columns writes its share of du and of a factor's gradient as addends, in fp32, and
these are added here in a fixed order: a result does not depend on which program ran first. Where the addends of a sum
lie, and where it goes, is read from a table on the GPU (`low_rank_tiles.Sums`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_megatron.layers import low_rank_tiles as tiles

_SUM_FIELDS = tl.constexpr(tiles.SUM_FIELDS)


@triton.jit
def chosen(which, first, second, third):
    """The part's own, 0, 1 or 2, of three pointers or numbers."""
    one = first
    if which == 1:
        one = second
    if which == 2:
        one = third
    return one


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
                out = chosen(tl.program_id(1) // 2, main0, main1, main2) + own
                tl.store(out, tl.load(out, own < length, 0.0) + gradient, own < length)
            else:
                there = (own // r) * pitch + tl.load(row + 5) + own % r
                tl.store(dbs + there, gradient.to(dbs.dtype.element_ty), own < length)


def three(values: Sequence[object]) -> list[object]:
    """One for each part a kernel can have; those beyond are not looked at."""
    return [*values, *[values[0]] * (tiles.MOST_PARTS - len(values))]


def sum_addends(
    addends: Tensor,
    table: Tensor,
    longest: int,
    du: Tensor | None,
    factors: Sequence[Tensor],
    mains: Sequence[Tensor] | None,
    *,
    factor_cut: tuple[int, int],
    cut: tuple[int, int] | None = None,
) -> tuple[Tensor, ...]:
    """Fill du, where there is one, and return the gradient of each factor, unless all are added to `mains`; `table` as
    in `low_rank_tiles.Sums`, with two sums a factor, of which the longest has so many places.

    factor_cut, cut: how many addends a program takes at a time, of how many places; of a factor, and of du.
    """
    assert du is None or cut is not None
    cut = cut or factor_cut
    of_du = 0 if du is None else triton.cdiv(du.numel(), cut[1])
    summing = _sum[(max(of_du, triton.cdiv(longest, factor_cut[1])), table.shape[0])]
    if mains is not None:
        summing(addends, table, factors[0] if du is None else du, factors[0], *three(mains), True, *cut, *factor_cut)
        return ()
    found = torch.empty(sum(f.numel() for f in factors), dtype=factors[0].dtype, device=addends.device)
    summing(addends, table, found if du is None else du, found, *three([found]), False, *cut, *factor_cut)
    pieces = found.split([f.numel() for f in factors])
    return tuple(piece.view(f.shape) for piece, f in zip(pieces, factors, strict=True))


def sum_into(out: Tensor, addends: Tensor, table: Tensor, longest: int, *, cut: tuple[int, int]) -> None:
    """Fill `out` with the one sum of a table with one row; the rest as in `sum_addends`."""
    assert table.shape[0] == 1
    _sum[(triton.cdiv(longest, cut[1]), 1)](addends, table, out, out, *three([out]), False, *cut, *cut)

# SPDX-License-Identifier: Apache-2.0
"""The passes of `mlp_adapter_kernels` over an MLP's activation and the adapters of both its layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lora_megatron.layers import mlp_adapter_kernels as kernels
from lora_megatron.layers import mlp_adapter_tiles as tiles
from lora_megatron.layers.addend_kernels import sum_addends, sum_into
from lora_megatron.layers.aside import FOR_COPIES
from lora_megatron.layers.low_rank import Update
from lora_megatron.layers.low_rank_tiles import padded


def can_take(update: Update | None, a: Tensor | None) -> bool:
    """Whether the kernels are made for adapters of these ranks."""
    return max(_factors(update, a)[1]) <= tiles.MOST_RANK


def _factors(update: Update | None, a: Tensor | None) -> tuple[tuple[Tensor, ...], list[int]]:
    """All of both layers, and their ranks."""
    bs, one = () if update is None else update.bs, () if a is None else (a,)
    return (*bs, *one), [b.shape[1] for b in bs] + [a.shape[0] for a in one]


class _Halves:
    """fc1's adapters as the kernels want them: of gate (or all) and of up, each there or not."""

    def __init__(self, update: Update | None) -> None:
        self.bs: list[Tensor | None] = [None, None]
        self.scales, self.ranks, self.firsts, self.which = [1.0, 1.0], [0, 0], [0, 0], [0, 0]
        self.u, self.size, first = None, 0, 0
        if update is None:
            return
        self.u = update.u.reshape(-1, update.u.shape[-1]).contiguous()
        self.size = self.u.shape[1]
        for place, (part, scale, b) in enumerate(zip(update.parts, update.scales, update.bs, strict=True)):
            half = int(part.start > 0)
            assert b.is_contiguous()
            self.bs[half], self.scales[half], self.ranks[half] = b, scale, b.shape[1]
            self.firsts[half], self.which[half] = first, place
            first += b.shape[1]

    @property
    def there(self) -> tuple[bool, bool]:
        return self.bs[0] is not None, self.bs[1] is not None


def activate(
    z: Tensor,
    bias: Tensor | None,
    update: Update,
    name: str,
    *,
    gated: bool,
) -> Tensor:
    """y [m, f] in z's type, from z [m, f or 2 f] without fc1's update. All contiguous."""
    tokens, columns = z.shape[0], z.shape[1] // (2 if gated else 1)
    tile = tiles.tile_of(z.element_size(), _factors(update, None)[1], tiles.FORWARD_TILES, gated=gated)
    assert tile is not None
    assert z.is_contiguous()
    halves = _Halves(update)
    y = torch.empty(tokens, columns, dtype=z.dtype, device=z.device)
    kernels.activate_adapted[(triton.cdiv(columns, tile.columns), triton.cdiv(tokens, tile.span))](
        z, bias, halves.u, *halves.bs, y, *halves.scales, tokens, columns, halves.size, *halves.ranks,
        *halves.firsts, tile.span, padded(halves.ranks), tile.tokens, tile.columns, name, gated, bias is not None,
        *halves.there, **tile.options,
    )  # fmt: skip
    return y


def activate_and_project(
    z: Tensor,
    bias: Tensor | None,
    update: Update,
    a: Tensor,
    name: str,
    *,
    gated: bool,
    aside: bool = False,
) -> tuple[Tensor, Tensor]:
    """y as of `activate`, and u2 = y A^T [m, r2] in its type, from a [r2, f]; of y as it is rounded, summed in fp32.

    aside: u2 is for an exchange's copies (`layers.aside`).
    """
    tokens, (rank, columns) = z.shape[0], a.shape
    tile = tiles.tile_of(z.element_size(), _factors(update, a)[1], tiles.PROJECTION_TILES, gated=gated)
    assert tile is not None
    assert z.is_contiguous()
    assert a.is_contiguous()
    halves, cut = _Halves(update), tiles.projection_addends_of(rank, tokens, columns, tile, z.device)
    addends = torch.empty(cut.size, dtype=torch.float32, device=z.device)
    y, u2 = (torch.empty(tokens, n, dtype=z.dtype, device=z.device) for n in (columns, rank))
    kernels.activate_and_project[(triton.cdiv(tokens, tile.tokens), triton.cdiv(columns, tile.span))](
        z, bias, halves.u, *halves.bs, a, y, addends, *halves.scales, tokens, columns, halves.size, *halves.ranks, rank,
        *halves.firsts, tile.span, padded(halves.ranks), padded([rank]), tile.tokens, tile.columns, name, gated,
        bias is not None, *halves.there, **tile.options,
    )  # fmt: skip
    summing = partial(sum_into, u2, addends, cut.table, cut.longest, cut=tiles.SUM)
    if aside:
        FOR_COPIES.do(summing)
    else:
        summing()
    return y, u2


class BackwardPass(NamedTuple):
    """What a backward pass leaves: dz in the shape of z; du [m, sum of r]; dB of each of fc1's adapters and dA, unless
    they have been added to their `mains`."""

    dz: Tensor
    du: Tensor | None
    factors: tuple[Tensor, ...]


def gradients(
    z: Tensor,
    bias: Tensor | None,
    update: Update | None,
    a: Tensor | None,
    du2: Tensor | None,
    dy: Tensor,
    name: str,
    *,
    gated: bool,
    mains: Sequence[Tensor] | None = None,
    aside: bool = False,
) -> BackwardPass:
    """From dy = dL/dy [m, f] without what comes of fc2's adapter, a [r2, f], du2 [m, r2]; z and update as in
    `activate`. Of an MLP that is not gated dz is written over dy. All contiguous.

    mains: fp32, as large as each B and A: each gradient is added to its own and none is returned.
    aside: du is for an exchange's copies (`layers.aside`); heeded where there are `mains`.
    """
    tokens, columns = dy.shape
    factors, ranks = _factors(update, a)
    tile = tiles.backward_tile_of(z.element_size(), ranks, tokens, columns, gated=gated)
    assert tile is not None
    assert all(t.is_contiguous() for t in (z, dy, *factors, *(mains or ())))
    halves, fc2_rank = _Halves(update), 0 if a is None else a.shape[0]
    cut = tiles.addends_of(tuple(ranks[: len(ranks) - (a is not None)]), fc2_rank, tokens, columns, tile, z.device)
    addends = torch.empty(cut.size, dtype=torch.float32, device=z.device)
    du0, db0, du1, db1 = (addends[cut.starts[2 * which + i] :] for which in halves.which for i in (0, 1))
    dz = torch.empty_like(z) if gated else dy
    du2 = None if du2 is None else du2.reshape(-1, fc2_rank).contiguous()
    kernels.adapted_gradients[(triton.cdiv(columns, tile.columns), triton.cdiv(tokens, tile.span))](
        z, bias, halves.u, *halves.bs, du2, a, dy, dz, du0, db0, du1, db1, addends[cut.starts[-1] :],
        *halves.scales, tokens, columns, halves.size, *halves.ranks, fc2_rank, *halves.firsts, tile.span,
        padded(halves.ranks), padded([fc2_rank]), tile.tokens, tile.columns, name, gated, bias is not None,
        *halves.there, a is not None, **tile.options,
    )  # fmt: skip
    du = None if halves.u is None else torch.empty_like(halves.u)
    cuts = {"cut": tiles.SUM, "factor_cut": tiles.FACTOR_SUM}
    summing = partial(sum_addends, addends, cut.table, cut.longest, du, factors, mains, **cuts)
    if aside and mains is not None:
        FOR_COPIES.do(summing)
        return BackwardPass(dz, du, ())
    return BackwardPass(dz, du, summing())

# SPDX-License-Identifier: Apache-2.0
"""How `mlp_adapter_kernels` cuts its work into programs, and the small table on the GPU by which sums find theirs."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_megatron.layers.low_rank_tiles import MOST_PARTS


class Tile(NamedTuple):
    """What a program takes at a time."""

    tokens: int
    columns: int
    span: int
    """Tokens of a program, which it takes one tile after the other, with its columns of the factors at hand; of
    PROJECTION_TILES columns, with u2 of its tokens at hand."""
    warps: int
    stages: int = 3
    """Tiles that are under way at once: one computed, the others on their way from memory."""
    registers: int | None = None
    """The most of a thread, where the compiler would take more and fewer programs would run beside each other."""

    @property
    def options(self) -> dict[str, int]:
        """Of a launch."""
        most = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **most}


# By the bytes of a number: of an MLP that is not gated, and of a gated one, which has half as much again of everything
# under way. A shorter span writes more addends of dB and dA (a span r numbers a column), or of u2 (r a token); fewer
# columns more addends of du (a tile of them r a token). Forward and backward those of two bytes are the fastest of a
# dozen, or near it, at rank 16 and the sizes of GPT-3 175B and Llama 2 70B between products on an H200, of the
# projection those of nine and, gated, of five; the rest are chosen by what they compile to. But for the first table 16
# tokens a warp at least: a product whose result goes into another one has all its warps along its rows in Triton 3.6,
# and with fewer rows they repeat each other's work. A program of one warp has nobody to wait for: faster forward, by
# 18% of a gated MLP, and slower backward, by 10% and more, where its tile must be narrow and so writes twice the
# addends of du. Fewer registers, or a tile's columns computed in two halves with fewer of them, make the backward pass
# slower by 5% and more.
FORWARD_TILES: dict[int, tuple[Tile, Tile]] = {
    2: (Tile(32, 128, 128, 4, 1), Tile(32, 128, 512, 4)),
    4: (Tile(32, 128, 128, 4), Tile(32, 64, 128, 4)),
}
PROJECTION_TILES: dict[int, tuple[Tile, Tile]] = {
    2: (Tile(16, 64, 1024, 1), Tile(16, 64, 1024, 1, registers=168)),
    4: (Tile(64, 32, 1024, 4), Tile(64, 32, 1024, 4)),
}
BACKWARD_TILES: dict[int, tuple[Tile, Tile]] = {
    2: (Tile(64, 128, 512, 4), Tile(64, 64, 1024, 4)),
    4: (Tile(64, 64, 512, 4), Tile(64, 64, 512, 4)),
}
TABLES = FORWARD_TILES, PROJECTION_TILES, BACKWARD_TILES
LONG_SPAN, FEWEST_PROGRAMS = 1024, 768
"""Tokens of a program of a backward pass, where that leaves so many programs, three for each place of an H200: at
2048 tokens and 49,152 columns 340 us where spans of 512 take 354."""
MOST_RANK = 16
"""Of an adapter. Wider ones leave registers for narrower tiles alone, whose addends of du are then as much as z is."""
SUM = 32, 128
"""Addends and places at a time of a program that sums: du has hundreds of addends and few places."""
FACTOR_SUM = 4, 1024
"""The same of dB and dA, which have an addend of each span of tokens, and many places."""


class Addends(NamedTuple):
    """What the programs of a pass write for `addend_kernels`' sum, one region behind the other."""

    table: Tensor
    """int64 on the GPU, as in `low_rank_tiles.Sums`: du and dB of each of fc1's adapters, nothing and dA of fc2's; or
    u2 alone."""
    starts: tuple[int, ...]
    """Of each of these sums' addends."""
    size: int
    """Of all addends, fp32."""
    longest: int
    """Places of the longest sum."""


def tile_of(itemsize: int, ranks: Sequence[int], tiles: Mapping[int, tuple[Tile, Tile]], *, gated: bool) -> Tile | None:
    """Of `tiles`, the one for factors of these ranks; None where a rank is too large for the kernels."""
    return tiles[itemsize][gated] if max(ranks) <= MOST_RANK else None


def backward_tile_of(itemsize: int, ranks: Sequence[int], tokens: int, columns: int, *, gated: bool) -> Tile | None:
    """Of BACKWARD_TILES likewise, for so many tokens and columns of y."""
    tile = tile_of(itemsize, ranks, BACKWARD_TILES, gated=gated)
    if tile is None or gated or tokens % LONG_SPAN:  # a span is walked to its end, whether there are tokens or not
        return tile
    programs = math.ceil(columns / tile.columns) * (tokens // LONG_SPAN)
    return tile if programs < FEWEST_PROGRAMS else tile._replace(span=max(tile.span, LONG_SPAN))


def addend_bytes(ranks: Sequence[int], fc2_rank: int, tokens: int, columns: int, *, gated: bool, itemsize: int) -> int:
    """Of all addends of a backward pass, for adapters as in `addends_of`; 0 where the kernels do not take them."""
    known = [*ranks, fc2_rank]
    tile = backward_tile_of(itemsize, known, tokens, columns, gated=gated) if any(known) else None
    if tile is None:
        return 0
    tiles, pieces = math.ceil(columns / tile.columns), math.ceil(tokens / tile.span)
    return 4 * (tiles * tokens * sum(ranks) + pieces * columns * sum(known))


@functools.cache  # without a limit: a CUDA graph reads the table for as long as it lives
def projection_addends_of(rank: int, tokens: int, columns: int, tile: Tile, device: torch.device) -> Addends:
    """Of u2 [tokens, rank], from `columns` columns of y.

    No plan counts them: in fp32 they are less than dz, of which there is none yet, and gone before y's FP8 codes come.
    """
    pieces, places = math.ceil(columns / tile.span), tokens * rank
    table = torch.tensor([[0, pieces, places, rank, rank, 0]], dtype=torch.int64, device=device)
    return Addends(table, (0,), pieces * places, places)


@functools.cache
def addends_of(
    ranks: tuple[int, ...], fc2_rank: int, tokens: int, columns: int, tile: Tile, device: torch.device
) -> Addends:
    """For fc1's adapters of `ranks` and one of fc2 (0: none) beside `columns` columns of y."""
    assert len(ranks) + bool(fc2_rank) <= MOST_PARTS
    tiles, pieces = math.ceil(columns / tile.columns), math.ceil(tokens / tile.span)
    rows: list[list[int]] = []
    place, behind = 0, 0
    for index, rank in enumerate((*ranks, fc2_rank)):
        if not rank:
            continue
        own = tokens * rank if index < len(ranks) else 0
        rows.append([place, tiles, own, rank, sum(ranks), sum(ranks[:index])])
        place += tiles * own
        rows.append([place, pieces, columns * rank, columns * rank, 0, behind])
        place += pieces * columns * rank
        behind += columns * rank
    table = torch.tensor(rows, dtype=torch.int64, device=device)
    return Addends(table, tuple(row[0] for row in rows), place, max(row[2] for row in rows))

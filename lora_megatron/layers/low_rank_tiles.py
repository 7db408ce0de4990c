# SPDX-License-Identifier: Apache-2.0
"""How the work of `low_rank_kernels` is cut into programs, and the small tables on the GPU by which they find theirs.

A table lies there for the process's life: a CUDA graph reads it for as long as the graph lives.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_megatron.layers.qkv import Part


class Tile(NamedTuple):
    """Tokens and columns of a program, and its warps."""

    tokens: int
    columns: int
    warps: int


# By the bytes of a row of B, up to so many, its rank made a power of two and 16 at least: what fits the shared memory
# of a Hopper GPU. Those of rank 16 are the fastest of 36 over the layers of GPT-3 175B, or of nine tried later.
# `_gradients` has many columns at small ranks, since it writes r fp32 numbers for each token and tile of columns, which
# `_sum` reads again.
_WIDE = {256: Tile(64, 128, 4), 512: Tile(32, 64, 4), 1024: Tile(32, 64, 4)}
ADD_TILES: dict[int, Tile] = {32: Tile(32, 128, 2), 64: Tile(32, 256, 8), **_WIDE}
GRADIENT_TILES: dict[int, Tile] = {32: Tile(32, 512, 4), 64: Tile(32, 256, 8), **_WIDE}
NARROW_GRADIENT_TILES: dict[int, Tile] = {**GRADIENT_TILES, 32: Tile(32, 256, 4)}
NARROW = 20480
"""Columns of all parts together up to which narrow tiles are faster: of GPT-3 175B's outputs, at rank 16 on an H200
between products, those of h = 12288 and of q, k and v at TP=2 (18432), but not at TP=1 (36864)."""
DU_SUM, FACTOR_SUM = (32, 256), (8, 256)
"""Addends and places at a time of a program that sums, measured likewise for narrow tiles."""

PROGRAMS = 512
"""That read a gradient at once, about: some for each of a GPU's 100 to 150 processors."""
MOST_PARTS = 3
FIELDS = 6
"""Of a part's row: first tile, columns, width of a run, its start, rank, first column of u."""
SUM_FIELDS = 6
"""Of a sum's row: first addend, addends, length, row length r, pitch between rows of the result, its first place."""


class Places(NamedTuple):
    """Where the parts of a fused output lie, and how their columns are cut into tiles."""

    table: Tensor
    """int32 [3, fields] on the GPU; a part that is not there begins behind all tiles."""
    counts: tuple[int, ...]
    """Tiles of each part."""
    aligned: int
    """What divides every place of a part in the fused output, and `even` every rank and place in u: powers of two by
    which the compiler knows how many neighbours one access may read."""
    even: int

    @property
    def tiles(self) -> int:
        return sum(self.counts)


class Sums(NamedTuple):
    """How the gradients of so many tokens are cut into programs, and what is summed afterwards."""

    table: Tensor
    """int64 [2 parts, fields] on the GPU: du and dB of each part."""
    pieces: int
    span: int
    addends: int
    """fp32 numbers that all programs of `_gradients` write."""
    longest: int
    """Places of the longest sum."""


def tile_of(bs: Sequence[Tensor], tiles: Mapping[int, Tile]) -> Tile | None:
    """Of `tiles`, the one for factors of these ranks; None where a rank is too large for the kernels."""
    row = padded([b.shape[1] for b in bs]) * bs[0].element_size()
    return next((tile for most, tile in tiles.items() if row <= most), None)


def gradient_tile_of(bs: Sequence[Tensor], parts: Sequence[Part]) -> Tile | None:
    """The same for the gradients of an output that consists of these parts."""
    is_narrow = sum(part.rows for part in parts) <= NARROW
    return tile_of(bs, NARROW_GRADIENT_TILES if is_narrow else GRADIENT_TILES)


def padded(ranks: Sequence[int]) -> int:
    """What a rank is filled up to, so that a tensor core takes it."""
    return max(16, 1 << (max(ranks) - 1).bit_length())


@functools.cache  # without a limit: see above, and they are tiny
def places_of(parts: tuple[Part, ...], ranks: tuple[int, ...], columns: int, device: torch.device) -> Places:
    """For tiles of so many columns."""
    assert 0 < len(parts) <= MOST_PARTS
    counts = tuple(math.ceil(part.rows / columns) for part in parts)
    rows = [
        [sum(counts[:i]), part.rows, part.stop - part.start, part.start, ranks[i], sum(ranks[:i])]
        for i, part in enumerate(parts)
    ]
    aligned = math.gcd(128, *(n for row in rows for n in row[1:4]))
    even = math.gcd(16, *(n for row in rows for n in row[4:6]))
    rows += [[sum(counts), 0, 1, 0, 1, 0]] * (MOST_PARTS - len(parts))
    return Places(torch.tensor(rows, dtype=torch.int32, device=device), counts, aligned, even)


@functools.cache
def sums_of(
    parts: tuple[Part, ...], ranks: tuple[int, ...], counts: tuple[int, ...], tokens: int, step: int,
    device: torch.device,
) -> Sums:  # fmt: skip
    """For so many tiles of each part, whose programs take `step` tokens at a time."""
    steps = math.ceil(tokens / step)
    span = math.ceil(steps / max(1, min(steps, PROGRAMS // sum(counts)))) * step
    pieces = math.ceil(tokens / span)
    rows, place, behind = [], 0, 0
    for index, (part, rank) in enumerate(zip(parts, ranks, strict=True)):
        rows.append([place, counts[index], tokens * rank, rank, sum(ranks), sum(ranks[:index])])
        place += counts[index] * tokens * rank
        rows.append([place, pieces, part.rows * rank, part.rows * rank, 0, behind])
        place += pieces * part.rows * rank
        behind += part.rows * rank
    table = torch.tensor(rows, dtype=torch.int64, device=device)
    return Sums(table, pieces, span, place, max(row[2] for row in rows))

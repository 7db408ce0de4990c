# SPDX-License-Identifier: Apache-2.0
"""How `low_rank_input_kernels` cuts its work into programs, and the table on the GPU by which sums find theirs."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_megatron.layers.low_rank_tiles import MOST_PARTS, padded
from lora_megatron.layers.mlp_adapter_tiles import Tile

MOST_RANKS = 64
"""Of all adapters of a layer together: more are no small product beside a large one any more."""

# By the bytes of a token's du, up to so many, its numbers made a power of two and 16 at least. The gradients of factors
# have programs of few columns and long spans: a span writes an addend of dA, the sum of ranks fp32 numbers a column.
# Those of 32 and 128 bytes are the fastest of ten and more, or near it, for one and three factors of rank 16 and 1024
# and 2048 tokens of GPT-3 175B's width, between products on an H200; the others are chosen by what they compile to.
# Both passes in one, which reads du once less, were slower than one after the other, with eight kinds of tiles.
GRADIENT_TILES: dict[int, Tile] = {
    32: Tile(64, 64, 512, 2),
    64: Tile(32, 128, 256, 4),
    128: Tile(64, 128, 512, 4),
    256: Tile(32, 64, 256, 8),
}
ADD_TILES: dict[int, Tile] = {
    32: Tile(64, 128, 64, 4),
    64: Tile(64, 128, 64, 4),
    128: Tile(64, 128, 64, 4),
    256: Tile(32, 64, 64, 8),
}
TABLES = GRADIENT_TILES, ADD_TILES
SUM_TILES: dict[int, Tile] = {**ADD_TILES, 32: Tile(64, 64, 64, 4)}
"""As ADD_TILES, where the rows are summed over ranks in the same pass; likewise of eight, at 1024 tokens."""
SUM = 4, 1024
"""Addends and places at a time of a program that sums: an addend for each span, of many places."""


class Addends(NamedTuple):
    """What the programs of a backward pass write for `addend_kernels`' sum: of each factor [pieces, r, width]."""

    table: Tensor
    """int64 on the GPU, as in `low_rank_tiles.Sums`: nothing (du is known here) and dA of each factor."""
    pieces: int
    size: int
    """Of all addends, fp32."""
    longest: int
    """Places of the longest sum."""


def tile_of(ranks: Sequence[int], itemsize: int, tiles: Mapping[int, Tile]) -> Tile | None:
    """Of `tiles`, the one for factors of these ranks; None where the kernels are not made for them."""
    if not 0 < len(ranks) <= MOST_PARTS or sum(ranks) > MOST_RANKS:
        return None
    row = padded([sum(ranks)]) * itemsize
    return next((tile for most, tile in tiles.items() if row <= most), None)


@functools.cache  # without a limit: a CUDA graph reads the table for as long as it lives
def addends_of(ranks: tuple[int, ...], tokens: int, width: int, span: int, device: torch.device) -> Addends:
    """For factors [r, width], whose programs take `span` tokens each.

    `planning.memory` leaves them out: they are no larger than x, which stood in memory at this moment before it was
    normed on the fly. A span of 256 tokens has 256 bytes a column at most (MOST_RANKS in fp32), x 512 or more. Only
    fewer than 128 tokens can have more, an addend alone, of the size of the factors in fp32.
    """
    pieces = math.ceil(tokens / span)
    rows, place, behind = list[list[int]](), 0, 0
    for rank in ranks:
        length = rank * width
        rows += [[0, 0, 0, 1, 1, 0], [place, pieces, length, length, 0, behind]]
        place += pieces * length
        behind += length
    table = torch.tensor(rows, dtype=torch.int64, device=device)
    return Addends(table, pieces, place, max(ranks) * width)

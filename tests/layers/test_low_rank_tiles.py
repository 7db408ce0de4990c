# SPDX-License-Identifier: Apache-2.0
"""How low-rank updates are cut for the GPU: every token, column and addend belongs to one program."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_megatron.layers import low_rank_tiles as tiles
from lora_megatron.layers.qkv import Part, gated_parts, qkv_parts, whole

PARTS: dict[str, tuple[Part, ...]] = {
    "q, k and v": qkv_parts(96, 96, 128),
    "q and v": qkv_parts(8, 4, 32)[::2],
    "gate and up": gated_parts(150),
    "fc1": whole("fc1", 49152),
}
RANKS = (5, 1, 17)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "table", [tiles.ADD_TILES, tiles.GRADIENT_TILES, tiles.NARROW_GRADIENT_TILES], ids=["update", "gradients", "narrow"]
)
def test_tiles_are_what_a_tensor_core_takes(table: dict[int, tiles.Tile]) -> None:
    assert list(table) == sorted(table)
    for tile in table.values():
        assert all(n & (n - 1) == 0 for n in tile), "powers of two"
        assert tile.tokens >= 16
        assert tile.columns >= 16


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 512), (torch.float32, 256)])
def test_very_large_ranks_have_no_tile(dtype: torch.dtype, most: int) -> None:
    for table in (tiles.ADD_TILES, tiles.GRADIENT_TILES, tiles.NARROW_GRADIENT_TILES):
        for rank in (1, 16, 17, 64, most):
            assert tiles.tile_of([torch.empty(3, 1, dtype=dtype), torch.empty(3, rank, dtype=dtype)], table)
        assert tiles.tile_of([torch.empty(3, most + 1, dtype=dtype)], table) is None
    assert [tiles.padded([rank]) for rank in (1, 16, 17, 512)] == [16, 16, 32, 512]


def test_gradients_of_narrow_outputs_have_narrow_tiles() -> None:
    (b,) = bs = [torch.empty(3, 16, dtype=torch.bfloat16)]
    for parts, narrow in ((PARTS["q, k and v"], False), (whole("o", tiles.NARROW), True), (PARTS["fc1"], False)):
        assert (
            tiles.gradient_tile_of(bs, parts) == (tiles.NARROW_GRADIENT_TILES if narrow else tiles.GRADIENT_TILES)[32]
        )
    assert tiles.gradient_tile_of([b.float().repeat(1, 40)], whole("o", 8)) is None


@pytest.mark.parametrize("tokens", [1, 300, 2048])
@pytest.mark.parametrize("columns", [64, 512])
@pytest.mark.parametrize("name", PARTS)
def test_sums_have_places_of_their_own_and_all_tokens(name: str, columns: int, tokens: int) -> None:
    parts = PARTS[name]
    ranks = RANKS[: len(parts)]
    places = tiles.places_of(parts, ranks, columns, CPU)
    assert places.counts == tuple(-(-part.rows // columns) for part in parts)
    assert places.table.shape == (tiles.MOST_PARTS, tiles.FIELDS)
    assert places.table[len(parts) :, 0].tolist() == [places.tiles] * (tiles.MOST_PARTS - len(parts))
    sums: Any = tiles.sums_of(parts, ranks, places.counts, tokens, 32, CPU)
    assert sums.span % 32 == 0
    assert (sums.pieces - 1) * sums.span < tokens <= sums.pieces * sums.span
    end, longest = 0, 0
    for index, (first, count, length, *_) in enumerate(sums.table.tolist()):
        part, rank = parts[index // 2], ranks[index // 2]
        assert (count, length) == (
            (sums.pieces, part.rows * rank) if index % 2 else (places.counts[index // 2], tokens * rank)
        )
        assert first == end
        end, longest = end + count * length, max(longest, length)
    assert (sums.addends, sums.longest) == (end, longest)

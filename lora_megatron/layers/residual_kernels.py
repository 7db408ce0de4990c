# SPDX-License-Identifier: Apache-2.0
"""The low-rank update of a row layer's output in the pass that adds bias and residual; in torch: `low_rank`.

Such an output is one projection and each rank's own, so columns need no table of places as in `low_rank_kernels`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lora_megatron.layers import low_rank_tiles as tiles

TILES = {**tiles.ADD_TILES, 32: tiles.Tile(32, 128, 4)}
"""Of rank 16 the fastest of eight at 1024 and 2048 tokens of GPT-3 175B's width, between products on an H200; there is
one more matrix to read than `_add` has."""


@triton.jit
def _add_residual(
    output, residual, bias, u, b, scale, tokens, columns, r,
    BIAS: tl.constexpr, R: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """output[token, column] += scale * u[token] . b[column] + bias[column] + residual[token, column]"""
    token = tl.program_id(1).to(tl.int64) * T + tl.arange(0, T)
    column = tl.program_id(0) * C + tl.arange(0, C)
    rank = tl.arange(0, R)
    own = column < columns
    left = tl.load(u + token[:, None] * r + rank[None, :], (token[:, None] < tokens) & (rank[None, :] < r), 0.0)
    right = tl.load(b + column[None, :] * r + rank[:, None], own[None, :] & (rank[:, None] < r), 0.0)
    where = token[:, None] * columns + column[None, :]
    inside = (token[:, None] < tokens) & own[None, :]
    value = tl.load(output + where, inside, 0.0).to(tl.float32)
    value += tl.dot(left, right, input_precision="ieee") * scale
    if BIAS:
        value += tl.load(bias + column, own, 0.0).to(tl.float32)[None, :]
    value += tl.load(residual + where, inside, 0.0).to(tl.float32)
    tl.store(output + where, value.to(output.dtype.element_ty), inside)


def add_product_and_residual(
    output: Tensor, residual: Tensor, bias: Tensor | None, u: Tensor, b: Tensor, scale: float
) -> None:
    """Write residual + output + bias + scale u b^T over `output`, computed in fp32 and rounded once.

    output, residual [m, n]; bias [n]; u [m, r]; b [n, r], for whose rank there are tiles; all contiguous.
    """
    assert all(t.is_contiguous() for t in (output, residual, u, b, *(() if bias is None else (bias,))))
    assert output.shape == residual.shape == (u.shape[0], b.shape[0])
    tile = tiles.tile_of([b], TILES)
    assert tile is not None
    tokens, columns = output.shape
    rank = b.shape[1]
    _add_residual[(triton.cdiv(columns, tile.columns), triton.cdiv(tokens, tile.tokens))](
        output, residual, output if bias is None else bias, u, b, scale, tokens, columns, rank,
        bias is not None, tiles.padded([rank]), tile.tokens, tile.columns, num_warps=tile.warps,
    )  # fmt: skip

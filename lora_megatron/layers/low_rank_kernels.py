# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for the low-rank product beside a large one; `low_rank` has the same in plain torch.

A rank-r update of an [m, n] matrix computes next to nothing and moves the matrix through the chip; done with general
matrix products it moves it several times. Here it is read once and written once, and its gradient is read once for
both factors.

Columns of a projection lie in a fused output as `groups` runs of `width`, `stride` apart (`qkv.Part`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_megatron.layers.qkv import Part

_TOKENS, _COLUMNS = 64, 128
_PROGRAMS = 512
"""That read a gradient at once, about: some for each of a GPU's 100 to 150 processors."""


@triton.jit
def _columns(index, width, stride, start):
    """Where the projection's column `index` lies in the fused output."""
    return (index // width) * stride + start + index % width


@triton.jit
def _add(
    fused, u, b, scale, tokens, n, row_size, u_size, width, stride, start,
    r: tl.constexpr, R: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """fused[token, column] += scale * u[token] . b[column]"""
    token = tl.program_id(1).to(tl.int64) * T + tl.arange(0, T)
    index = tl.program_id(0) * C + tl.arange(0, C)
    rank = tl.arange(0, R)
    left = tl.load(u + token[:, None] * u_size + rank[None, :], (token[:, None] < tokens) & (rank[None, :] < r), 0.0)
    right = tl.load(b + index[None, :] * r + rank[:, None], (index[None, :] < n) & (rank[:, None] < r), 0.0)
    delta = tl.dot(left, right, input_precision="ieee") * scale
    where = token[:, None] * row_size + _columns(index, width, stride, start)[None, :]
    inside = (token[:, None] < tokens) & (index[None, :] < n)
    value = tl.load(fused + where, inside, 0.0).to(tl.float32) + delta
    tl.store(fused + where, value.to(fused.dtype.element_ty), inside)


@triton.jit
def _gradients(
    grad, u, b, du, db, scale, n, row_size, u_size, width, stride, start, tokens, span: tl.constexpr,
    r: tl.constexpr, R: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A program has C columns and walks over `span` tokens: its share of those columns' rows of db, and of those
    tokens' du."""
    tile, piece = tl.program_id(0), tl.program_id(1)
    index = tile * C + tl.arange(0, C)
    rank = tl.arange(0, R)
    column = _columns(index, width, stride, start)
    right = tl.load(b + index[:, None] * r + rank[None, :], (index[:, None] < n) & (rank[None, :] < r), 0.0)
    total = tl.zeros([C, R], tl.float32)
    for first in range(0, span, T):
        token = piece * span + first + tl.arange(0, T).to(tl.int64)
        inside = (token[:, None] < tokens) & (index[None, :] < n)
        values = tl.load(grad + token[:, None] * row_size + column[None, :], inside, 0.0)
        known = (token[:, None] < tokens) & (rank[None, :] < r)
        left = tl.load(u + token[:, None] * u_size + rank[None, :], known, 0.0)
        share = tl.dot(values, right, input_precision="ieee") * scale
        tl.store(du + (tile * tokens + token[:, None]) * r + rank[None, :], share, known)
        total += tl.dot(tl.trans(values), left, input_precision="ieee")
    where = (piece.to(tl.int64) * n + index[:, None]) * r + rank[None, :]
    tl.store(db + where, total * scale, (index[:, None] < n) & (rank[None, :] < r))


def _padded(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def add_product(fused: Tensor, u: Tensor, b: Tensor, part: Part, scale: float) -> None:
    """Add scale u b^T to the columns of `part` of `fused`, in place.

    fused [m, groups * stride]; u [m, r] with any row stride; b [part.rows, r].
    """
    tokens, rank = u.shape
    grid = (triton.cdiv(part.rows, _COLUMNS), triton.cdiv(tokens, _TOKENS))
    _add[grid](
        fused, u, b, scale, tokens, part.rows, fused.shape[1], u.stride(0),
        part.stop - part.start, part.stride, part.start, rank, _padded(rank), _TOKENS, _COLUMNS,
    )  # fmt: skip


def product_gradients(grad: Tensor, u: Tensor, b: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    """(du [m, r], db [part.rows, r]) of `add_product`, from its output's gradient; summed in fp32 in a fixed order."""
    tokens, rank = u.shape
    tiles, steps = triton.cdiv(part.rows, _COLUMNS), triton.cdiv(tokens, _TOKENS)
    span = triton.cdiv(steps, max(1, min(steps, _PROGRAMS // tiles))) * _TOKENS
    pieces = triton.cdiv(tokens, span)
    du = torch.empty(tiles, tokens, rank, dtype=torch.float32, device=grad.device)
    db = torch.empty(pieces, part.rows, rank, dtype=torch.float32, device=grad.device)
    _gradients[(tiles, pieces)](
        grad, u, b, du, db, scale, part.rows, grad.shape[1], u.stride(0),
        part.stop - part.start, part.stride, part.start, tokens, span, rank, _padded(rank), _TOKENS, _COLUMNS,
    )  # fmt: skip
    return du.sum(0).to(u.dtype), db.sum(0).to(b.dtype)

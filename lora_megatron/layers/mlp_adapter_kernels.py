# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of an MLP's activation with the adapters of both layers inside it.

    z' = z + s u B^T + c     y = act(z')     u2 = y A^T        gated: of each half its own, y = act(gate) up
    dy' = dy + du2 A         dz = dy' act'(z')                 du = s dz B   dB = s dz^T u   dA = du2^T y

A program holds C columns of the factors and walks over a span of tokens, T at a time; where it sums u2 it has T tokens
and walks over a span of columns. z is read as the product wrote it, so between two products only what the next one
reads is written, and addends of u2 and of the factors' gradients; in fp32 from the first operation to the last, but
where a tensor core multiplies y or dz, rounded as they are written. Sums over tokens and columns are added up in a
fixed order, by `addend_kernels`. `mlp_adapters` starts them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_megatron.layers.activation_kernels import _value_and_slope


@triton.jit
def _u(u, token, tokens, row_size, first, r, R: tl.constexpr, ADAPTED: tl.constexpr):
    """An adapter's columns of u: [T, R]."""
    tile = 0.0
    if ADAPTED:
        rank = tl.arange(0, R)
        known = (token[:, None] < tokens) & (rank[None, :] < r)
        tile = tl.load(u + token[:, None] * row_size + first + rank[None, :], known, 0.0)
    return tile


@triton.jit
def _b(b, index, columns, r, R: tl.constexpr, ADAPTED: tl.constexpr):
    """[C, R]"""
    tile = 0.0
    if ADAPTED:
        rank = tl.arange(0, R)
        tile = tl.load(b + index[:, None] * r + rank[None, :], (index[:, None] < columns) & (rank[None, :] < r), 0.0)
    return tile


@triton.jit
def _fc1(z, bias, where, column, inside, own, u, b, scale, BIAS: tl.constexpr, ADAPTED: tl.constexpr):
    """z' [T, C] of one half."""
    value = tl.load(z + where, inside, 0.0).to(tl.float32)
    if ADAPTED:
        value += tl.dot(u, tl.trans(b), input_precision="ieee") * scale
    if BIAS:
        value += tl.load(bias + column, own, 0.0).to(tl.float32)[None, :]
    return value


@triton.jit
def activate_adapted(
    z, bias, u, b0, b1, y, scale0, scale1, tokens, columns, u_size, r0, r1, first0, first1,
    span: tl.constexpr, R: tl.constexpr, T: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """y; FIRST and SECOND: whether this half of fc1's output is adapted."""
    index = tl.program_id(0) * C + tl.arange(0, C)
    own = index < columns
    width = columns * 2 if GATED else columns
    half0, half1 = _b(b0, index, columns, r0, R, FIRST), _b(b1, index, columns, r1, R, SECOND)
    for step in range(0, span, T):
        token = tl.program_id(1).to(tl.int64) * span + step + tl.arange(0, T)
        inside = (token[:, None] < tokens) & own[None, :]
        where = token[:, None] * width + index[None, :]
        left0 = _u(u, token, tokens, u_size, first0, r0, R, FIRST)
        value, _ = _value_and_slope(_fc1(z, bias, where, index, inside, own, left0, half0, scale0, BIAS, FIRST), KIND)
        if GATED:
            left1 = _u(u, token, tokens, u_size, first1, r1, R, SECOND)
            column = columns + index
            value *= _fc1(z, bias, where + columns, column, inside, own, left1, half1, scale1, BIAS, SECOND)
        tl.store(y + token[:, None] * columns + index[None, :], value.to(y.dtype.element_ty), inside)


@triton.jit
def activate_and_project(
    z, bias, u, b0, b1, a, y, u2, scale0, scale1, tokens, columns, u_size, r0, r1, r2, first0, first1,
    span: tl.constexpr, R: tl.constexpr, R2: tl.constexpr, T: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """y, and addends of u2 (by spans of columns): a program has T tokens and walks over a span, C columns at a time."""
    piece, rank2 = tl.program_id(1), tl.arange(0, R2)
    token = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    width = columns * 2 if GATED else columns
    left0 = _u(u, token, tokens, u_size, first0, r0, R, FIRST)
    left1 = _u(u, token, tokens, u_size, first1, r1, R, SECOND)
    total = tl.zeros([T, R2], tl.float32)
    for step in range(0, span, C):
        index = piece * span + step + tl.arange(0, C)
        own = index < columns
        inside = (token[:, None] < tokens) & own[None, :]
        half0, half1 = _b(b0, index, columns, r0, R, FIRST), _b(b1, index, columns, r1, R, SECOND)
        where = token[:, None] * width + index[None, :]
        value, _ = _value_and_slope(_fc1(z, bias, where, index, inside, own, left0, half0, scale0, BIAS, FIRST), KIND)
        if GATED:
            column = columns + index
            value *= _fc1(z, bias, where + columns, column, inside, own, left1, half1, scale1, BIAS, SECOND)
        value = value.to(y.dtype.element_ty)
        tl.store(y + token[:, None] * columns + index[None, :], value, inside)
        places = rank2[:, None].to(tl.int64) * columns + index[None, :]
        factor2 = tl.load(a + places, (rank2[:, None] < r2) & own[None, :], 0.0)
        total += tl.dot(value, tl.trans(factor2), input_precision="ieee")
    place = (piece.to(tl.int64) * tokens + token[:, None]) * r2 + rank2[None, :]
    tl.store(u2 + place, total, (token[:, None] < tokens) & (rank2[None, :] < r2))


@triton.jit
def adapted_gradients(
    z, bias, u, b0, b1, du2, a, dy, dz, du0, db0, du1, db1, da, scale0, scale1, tokens, columns,
    u_size, r0, r1, r2, first0, first1,
    span: tl.constexpr, R: tl.constexpr, R2: tl.constexpr, T: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, FC2: tl.constexpr,
):  # fmt: skip
    """dz, and addends of du (by tiles of columns), dB and dA (by spans of tokens)."""
    tile, piece = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    index, rank = tl.program_id(0) * C + tl.arange(0, C), tl.arange(0, R)
    own = index < columns
    width = columns * 2 if GATED else columns
    half0, half1 = _b(b0, index, columns, r0, R, FIRST), _b(b1, index, columns, r1, R, SECOND)
    total0, total1 = tl.zeros([C, R], tl.float32), tl.zeros([C, R], tl.float32)
    if FC2:
        rank2 = tl.arange(0, R2)
        places = rank2[:, None].to(tl.int64) * columns + index[None, :]
        factor2 = tl.load(a + places, (rank2[:, None] < r2) & own[None, :], 0.0)
        total2 = tl.zeros([C, R2], tl.float32)
    for step in range(0, span, T):
        token = piece * span + step + tl.arange(0, T)
        inside = (token[:, None] < tokens) & own[None, :]
        where = token[:, None] * width + index[None, :]
        left0 = _u(u, token, tokens, u_size, first0, r0, R, FIRST)
        left1 = _u(u, token, tokens, u_size, first1, r1, R, SECOND)
        back = _u(du2, token, tokens, r2, 0, r2, R2, FC2)
        grad = tl.load(dy + token[:, None] * columns + index[None, :], inside, 0.0).to(tl.float32)
        if FC2:
            grad += tl.dot(back, factor2, input_precision="ieee")
        value, slope = _value_and_slope(
            _fc1(z, bias, where, index, inside, own, left0, half0, scale0, BIAS, FIRST), KIND
        )
        first = grad * slope
        if GATED:
            up = _fc1(z, bias, where + columns, columns + index, inside, own, left1, half1, scale1, BIAS, SECOND)
            second = (grad * value).to(dz.dtype.element_ty)
            first *= up
            value *= up
            tl.store(dz + where + columns, second, inside)
        first = first.to(dz.dtype.element_ty)
        tl.store(dz + where, first, inside)
        if FIRST:
            known = (token[:, None] < tokens) & (rank[None, :] < r0)
            place = (tile * tokens + token[:, None]) * r0 + rank[None, :]
            tl.store(du0 + place, tl.dot(first, half0, input_precision="ieee") * scale0, known)
            total0 += tl.dot(tl.trans(first), left0, input_precision="ieee")
        if SECOND:
            known = (token[:, None] < tokens) & (rank[None, :] < r1)
            place = (tile * tokens + token[:, None]) * r1 + rank[None, :]
            tl.store(du1 + place, tl.dot(second, half1, input_precision="ieee") * scale1, known)
            total1 += tl.dot(tl.trans(second), left1, input_precision="ieee")
        if FC2:
            total2 += tl.dot(tl.trans(value.to(a.dtype.element_ty)), back, input_precision="ieee")
    if FIRST:
        place = (piece * columns + index[:, None]) * r0 + rank[None, :]
        tl.store(db0 + place, total0 * scale0, own[:, None] & (rank[None, :] < r0))
    if SECOND:
        place = (piece * columns + index[:, None]) * r1 + rank[None, :]
        tl.store(db1 + place, total1 * scale1, own[:, None] & (rank[None, :] < r1))
    if FC2:
        place = (piece * r2 + rank2[None, :]) * columns + index[:, None]
        tl.store(da + place, total2, own[:, None] & (rank2[None, :] < r2))

# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for what stands between stored weights and the hardware's FP8 GEMM.

Each has a reference in plain torch (`fp8`, `nf4`) that computes the same numbers, and tests compare them bit by bit.
All are bound by memory: they read each byte once and write it once.

- `unpack`: NF4 codes to FP8 or bf16, as they are or transposed.
- `transpose`: bytes [n, k] -> [k, n]. Hopper's FP8 GEMM reads both factors along the inner dimension, so the backward
  product needs W the other way round.
- `quantise_rows`: a token's largest magnitude, its scale and its FP8 codes, the row read from memory once: held in
  registers, or found in the cache when it is read again, whichever is faster.
- `store_quantised`: the same of a row in registers, for kernels that make one (`layers.norm_kernels`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_megatron.layers.storage.held_rows import (
    LARGEST,
    SMALLEST,
    can_hold,
    larger,
    packed,
    store_codes,
    store_scale,
)

_PIECE = 4096
"""Columns at a time of a program that reads a row twice."""
_NARROW, _WIDE = 16384, 40960
"""Rows of more columns than the first and at most the second are read twice, narrower and wider ones held. Between
products on an H200, rows of GPT-3 175B that are multiplied by a factor take, held and read twice (by 16 warps, by 32),
us: 12,288 columns 23, 33, 31; 36,864 columns 95, 102, 80; 49,152 columns 115, 131, 160. The limits between these are
chosen."""


@triton.jit
def _unpack(
    packed, block_codes, lowest, step, scale, levels, out, rows, columns,
    AXIS: tl.constexpr, SCALED: tl.constexpr, TRANSPOSED: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """out = level[code] * (block's scale / W's scale); a program does R rows of one block of 64 columns."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    block = tl.program_id(1)
    blocks = columns // 64
    present = row < rows
    # A group is 256 blocks of a row (axis 0), or 256 rows of a block column (axis 1).
    if AXIS == 0:  # noqa: SIM108  # both branches are compile-time
        group = row * ((blocks + GROUP - 1) // GROUP) + block // GROUP
    else:
        group = (row // GROUP) * blocks + block
    ratio = tl.load(block_codes + row.to(tl.int64) * blocks + block, present, 0).to(tl.float32)
    ratio = ratio * tl.load(step + group, present, 0.0) + tl.load(lowest + group, present, 0.0)
    if SCALED:
        if AXIS == 0:
            ratio = tl.div_rn(ratio, tl.load(scale + row, present, 1.0))
        else:
            ratio = tl.div_rn(ratio, tl.load(scale + block))
        ratio = tl.minimum(ratio, LARGEST)
    byte = block * 32 + tl.arange(0, 32)
    codes = tl.load(packed + row[:, None].to(tl.int64) * (columns // 2) + byte[None, :], present[:, None], 0)
    high = tl.load(levels + (codes >> 4).to(tl.int32)) * ratio[:, None]
    low = tl.load(levels + (codes & 15).to(tl.int32)) * ratio[:, None]
    values = tl.interleave(high, low).to(out.dtype.element_ty)
    column = block * 64 + tl.arange(0, 64)
    if TRANSPOSED:
        where = column[:, None].to(tl.int64) * rows + row[None, :]
        tl.store(out + where, tl.trans(values), present[None, :])
    else:
        where = row[:, None].to(tl.int64) * columns + column[None, :]
        tl.store(out + where, values, present[:, None])


def unpack(
    packed: Tensor,
    block_codes: Tensor,
    lowest: Tensor,
    step: Tensor,
    levels: Tensor,
    *,
    scale: Tensor | None,
    axis: int,
    group: int,
    dtype: torch.dtype,
    transposed: bool = False,
) -> Tensor:
    """NF4 weights / `scale` (per row, or per block of 64 columns) in `dtype`: [n, k], or [k, n] transposed."""
    rows, columns = packed.shape[0], packed.shape[1] * 2
    out = torch.empty((columns, rows) if transposed else (rows, columns), dtype=dtype, device=packed.device)
    height = 128
    grid = (triton.cdiv(rows, height), columns // 64)
    _unpack[grid](
        packed, block_codes, lowest, step, scale, levels, out, rows, columns,
        axis, scale is not None, transposed, height, group, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _transpose(source, out, rows, columns, SIZE: tl.constexpr):
    row = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    values = tl.load(source + row[:, None].to(tl.int64) * columns + column[None, :], inside, 0)
    inside = (column[:, None] < columns) & (row[None, :] < rows)
    tl.store(out + column[:, None].to(tl.int64) * rows + row[None, :], tl.trans(values), inside)


def transpose(source: Tensor) -> Tensor:
    """[n, k] of one-byte elements -> [k, n], contiguous."""
    rows, columns = source.shape
    out = torch.empty(columns, rows, dtype=source.dtype, device=source.device)
    grid = (triton.cdiv(rows, 128), triton.cdiv(columns, 128))
    _transpose[grid](source.view(torch.uint8), out.view(torch.uint8), rows, columns, 128, num_warps=8)
    return out


@triton.jit
def _quantise_rows(
    x, factor, codes, scales, known, columns: tl.constexpr, C: tl.constexpr,
    FACTOR: tl.constexpr, MEASURE: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    """One row a program, in pieces of C; a second pass over the row finds it in the cache.

    With MEASURE alone scales = largest magnitudes; with CAST alone they are `known`, and elsewhere than scales: a
    thread may store the one before another has read the other.
    """
    row = tl.program_id(0).to(tl.int64)
    if MEASURE:
        largest = tl.zeros([C], tl.float32)
        for start in range(0, columns, C):
            column = start + tl.arange(0, C)
            values = tl.load(x + row * columns + column, column < columns, 0.0).to(tl.float32)
            if FACTOR:
                values *= tl.load(factor + column, column < columns, 0.0)
                values = values.to(x.dtype.element_ty).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(values))
        scale = tl.max(largest, 0)
        if CAST:
            scale = tl.where(scale > SMALLEST, tl.div_rn(scale, LARGEST), 1.0)
        tl.store(scales + row, scale)
    else:
        scale = tl.load(known + row)
        scale = tl.where(scale > SMALLEST, tl.div_rn(scale, LARGEST), 1.0)
        tl.store(scales + row, scale)
    if CAST:
        inverse = tl.div_rn(1.0, scale)  # to the bit what the reference has: Triton's own division is approximate
        for start in range(0, columns, C):
            column = start + tl.arange(0, C)
            values = tl.load(x + row * columns + column, column < columns, 0.0).to(tl.float32)
            if FACTOR:
                values *= tl.load(factor + column, column < columns, 0.0)
                values = values.to(x.dtype.element_ty).to(tl.float32)
            values = tl.clamp(values * inverse, -LARGEST, LARGEST)
            tl.store(codes + row * columns + column, values.to(tl.float8e4nv), column < columns)


@triton.jit
def _quantise_held(x, factor, codes, scales, columns: tl.constexpr, C: tl.constexpr, FACTOR: tl.constexpr):
    """The same of a bf16 row that the program holds from its one reading on."""
    row = tl.program_id(0).to(tl.int64)
    held = ()
    largest = tl.zeros([C], tl.float32)
    for piece in tl.static_range((columns + C - 1) // C):
        column = piece * C + tl.arange(0, C)
        values = tl.load(x + row * columns + column, column < columns, 0.0).to(tl.float32)
        if FACTOR:
            values *= tl.load(factor + column, column < columns, 0.0)
        words = packed(values, C)
        largest = larger(largest, words)
        held = held + (words,)  # type: ignore[assignment]  # noqa: RUF005  # a tuple of Triton's grows by + alone
    inverse = store_scale(scales + row, largest)
    for piece in tl.static_range((columns + C - 1) // C):
        column = piece * C + tl.arange(0, C)
        store_codes(codes + row * columns + column, column < columns, held[piece], inverse)


@triton.jit
def store_quantised(rounded, codes, scales, row, column, width: tl.constexpr):
    """The codes and the scale of a row that a program holds, as `_quantise_rows` has them of `rounded` in memory."""
    inside = column < width
    if rounded.dtype == tl.bfloat16:  # by its bits: a conversion back keeps the one to bf16 from being done in pairs
        values = (rounded.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        values = rounded.to(tl.float32)
    values = tl.where(inside, values, 0.0)
    scale = tl.max(tl.abs(values), 0)
    scale = tl.where(scale > SMALLEST, tl.div_rn(scale, LARGEST), 1.0)
    tl.store(scales + row, scale)
    values = tl.clamp(values * tl.div_rn(1.0, scale), -LARGEST, LARGEST)
    where = codes + row.to(tl.int64) * width + column
    # Eight at a time, as 16 bytes of bf16 are read: for 16 codes at a time threads would trade values first.
    where = tl.multiple_of(where, 8 if width % 8 == 0 else 1)
    tl.store(where, values.to(tl.float8e4nv), inside)


def room_for_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of x [..., k], for a kernel that makes it: [m, k] e4m3 and [m, 1] fp32."""
    rows, columns = x.numel() // x.shape[-1], x.shape[-1]
    return (
        torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device),
        torch.empty(rows, 1, dtype=torch.float32, device=x.device),
    )


def quantise_rows(
    x: Tensor, factor: Tensor | None, *, agree: Callable[[Tensor], object] | None = None
) -> tuple[Tensor, Tensor]:
    """x diag(factor), rounded to the type of x, in FP8 with a scale per row: [m, k] -> [m, k] e4m3, [m, 1] fp32.

    `agree` is given each row's largest magnitude, to raise it to that of all ranks in place.
    """
    rows, columns = x.shape
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)

    def launch(into: Tensor, known: Tensor | None, *, measure: bool, cast: bool) -> None:
        flags = (columns, _PIECE, factor is not None, measure, cast)
        warps = 32 if measure and _NARROW < columns <= _WIDE else 16
        _quantise_rows[(rows,)](x, factor, codes, into, known, *flags, num_warps=warps)

    if agree is None and can_hold(x, columns) and not _NARROW < columns <= _WIDE:
        piece, warps = (4096, 16) if columns <= _NARROW else (8192, 32)
        _quantise_held[(rows,)](x, factor, codes, scales, columns, piece, factor is not None, num_warps=warps)
    elif agree is None:
        launch(scales, None, measure=True, cast=True)
    else:
        largest = torch.empty_like(scales)
        launch(largest, None, measure=True, cast=False)
        agree(largest)
        launch(scales, largest, measure=False, cast=True)
    return codes, scales

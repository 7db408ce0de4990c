# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the MLP's activation, alone or together with the FP8 rounding of what comes out of it.

`activation.Activation.exactly` is the reference. A program does one row. To round a row to FP8 its largest magnitude
must be known: the row is read and computed twice, the second time from the cache, which is far less than writing it
and reading it again. What adapters read of it besides is written on the second pass. (Where nothing reads anything
besides, and no other rank has a part of the row, `held_activation_kernels` computes it once.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

_LARGEST = tl.constexpr(448.0)  # of e4m3
_SMALLEST = tl.constexpr(1e-30)  # as in `storage.fp8`
_PIECE = 4096
Agree = Callable[[Tensor], object]


@triton.jit
def _sigmoid(power):
    """1 / (1 + 2^power), of v for power = -v log2(e): the square of an approximate reciprocal root takes two
    instructions, a division eight, and is off by 3e-7 of itself. (The exponent's own rounding, 6e-8 of it, is off by
    more where v is far below 0.)"""
    root = tl.rsqrt(1.0 + tl.exp2(power))
    return root * root


@triton.jit
def _value_and_slope(v, KIND: tl.constexpr):
    """act(v) and act'(v), fp32."""
    if KIND == "gelu_tanh":
        # (1 + tanh u) / 2 = s = sigmoid(2 u), 1 - tanh(u)^2 = 4 s (1 - s): fewer operations, exact in the tails. With
        # 2 u = v (1.5957691216057308 + 0.07135481627260025 v^2), and log2(e) multiplied into both numbers.
        square = v * v
        s = _sigmoid(v * (-2.302208198144325 - 0.1029432395800235 * square))
        value = v * s
        slope = s + tl.fma(-value, s, value) * (1.5957691216057308 + 0.21406444881780076 * square)
    elif KIND == "gelu":
        below = 0.5 * (1.0 + tl.erf(v * 0.7071067811865476))
        value = v * below
        slope = below + v * 0.3989422804014327 * tl.exp(-0.5 * v * v)
    elif KIND == "silu":
        s = _sigmoid(v * -1.4426950408889634)
        value = v * s
        slope = s + tl.fma(-value, s, value)
    else:
        value = tl.maximum(v, 0.0)
        slope = tl.where(v > 0, 1.0, 0.0)
    return value, slope


@triton.jit
def _loaded(x, bias, where, column, inside, BIAS: tl.constexpr):
    value = tl.load(x + where, inside, 0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + column, inside, 0.0).to(tl.float32)
    return value


@triton.jit
def _outputs(x, bias, row, column, inside, columns, KIND: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr):
    """Columns `column` of the row's y."""
    start = row * (columns * 2 if GATED else columns)
    value, _ = _value_and_slope(_loaded(x, bias, start + column, column, inside, BIAS), KIND)
    if GATED:
        value *= _loaded(x, bias, start + columns + column, columns + column, inside, BIAS)
    return value


@triton.jit
def _gradients(
    x, bias, grad, row, column, inside, columns, KIND: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """dL/dx at `column` (gate's, if gated), dL/dup, and y; the second means nothing if not gated."""
    start = row * (columns * 2 if GATED else columns)
    value, slope = _value_and_slope(_loaded(x, bias, start + column, column, inside, BIAS), KIND)
    dy = tl.load(grad + row * columns + column, inside, 0.0).to(tl.float32)
    first = dy * slope
    second = dy * value
    if GATED:
        up = _loaded(x, bias, start + columns + column, columns + column, inside, BIAS)
        first *= up
        value *= up
    return first, second, value


@triton.jit
def _forward(
    x, bias, factor, out, scales, known, y, columns: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr, FACTOR: tl.constexpr, MEASURE: tl.constexpr,
    CAST: tl.constexpr,
):  # fmt: skip
    """out = y; with MEASURE or CAST its FP8 codes instead (`storage.kernels.quantise_rows` has the same two), and with
    KEEP y itself beside them."""
    row = tl.program_id(0).to(tl.int64)
    scale = 1.0
    if MEASURE:
        largest = tl.zeros([C], tl.float32)
        for start in range(0, columns, C):
            column = start + tl.arange(0, C)
            value = _outputs(x, bias, row, column, column < columns, columns, KIND, GATED, BIAS)
            if FACTOR:
                value *= tl.load(factor + column, column < columns, 0.0)
            value = value.to(x.dtype.element_ty).to(tl.float32)
            largest = tl.maximum(largest, tl.where(column < columns, tl.abs(value), 0.0))
        scale = tl.max(largest, 0)
        if CAST:
            scale = tl.where(scale > _SMALLEST, tl.div_rn(scale, _LARGEST), 1.0)
        tl.store(scales + row, scale)
    elif CAST:
        scale = tl.load(known + row)
        scale = tl.where(scale > _SMALLEST, tl.div_rn(scale, _LARGEST), 1.0)
        tl.store(scales + row, scale)
    if CAST or not MEASURE:
        if CAST:
            inverse = tl.div_rn(1.0, scale)  # exact: Triton's own division is approximate
        for start in range(0, columns, C):
            column = start + tl.arange(0, C)
            value = _outputs(x, bias, row, column, column < columns, columns, KIND, GATED, BIAS)
            if KEEP:
                tl.store(y + row * columns + column, value.to(y.dtype.element_ty), column < columns)
            if CAST:
                if FACTOR:
                    value *= tl.load(factor + column, column < columns, 0.0)
                value = value.to(x.dtype.element_ty).to(tl.float32)
                value = tl.clamp(value * inverse, -_LARGEST, _LARGEST)
            tl.store(out + row * columns + column, value.to(out.dtype.element_ty), column < columns)


@triton.jit
def _backward(
    x, bias, grad, factor, out, scales, known, dx, y, columns: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, KEEP_DX: tl.constexpr, KEEP_Y: tl.constexpr, FACTOR: tl.constexpr,
    MEASURE: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    """out = dL/dx; with MEASURE or CAST its FP8 codes, and beside them dL/dx with KEEP_DX and y with KEEP_Y."""
    row = tl.program_id(0).to(tl.int64)
    width = columns * 2 if GATED else columns
    scale = 1.0
    if MEASURE:
        largest = tl.zeros([C], tl.float32)
        for start in range(0, columns, C):
            column = start + tl.arange(0, C)
            inside = column < columns
            first, second, _ = _gradients(x, bias, grad, row, column, inside, columns, KIND, GATED, BIAS)
            if FACTOR:
                first *= tl.load(factor + column, inside, 0.0)
                if GATED:
                    second *= tl.load(factor + columns + column, inside, 0.0)
            first = first.to(x.dtype.element_ty).to(tl.float32)
            second = second.to(x.dtype.element_ty).to(tl.float32)
            largest = tl.maximum(largest, tl.where(inside, tl.abs(first), 0.0))
            if GATED:
                largest = tl.maximum(largest, tl.where(inside, tl.abs(second), 0.0))
        scale = tl.max(largest, 0)
        if CAST:
            scale = tl.where(scale > _SMALLEST, tl.div_rn(scale, _LARGEST), 1.0)
        tl.store(scales + row, scale)
    elif CAST:
        scale = tl.load(known + row)
        scale = tl.where(scale > _SMALLEST, tl.div_rn(scale, _LARGEST), 1.0)
        tl.store(scales + row, scale)
    if CAST or not MEASURE:
        if CAST:
            inverse = tl.div_rn(1.0, scale)  # exact: Triton's own division is approximate
        for start in range(0, columns, C):
            column = start + tl.arange(0, C)
            inside = column < columns
            first, second, value = _gradients(x, bias, grad, row, column, inside, columns, KIND, GATED, BIAS)
            if KEEP_Y:
                tl.store(y + row * columns + column, value.to(y.dtype.element_ty), inside)
            if KEEP_DX:
                tl.store(dx + row * width + column, first.to(dx.dtype.element_ty), inside)
                if GATED:
                    tl.store(dx + row * width + columns + column, second.to(dx.dtype.element_ty), inside)
            if CAST:
                if FACTOR:
                    first *= tl.load(factor + column, inside, 0.0)
                    if GATED:
                        second *= tl.load(factor + columns + column, inside, 0.0)
                first = first.to(x.dtype.element_ty).to(tl.float32)
                second = second.to(x.dtype.element_ty).to(tl.float32)
                first = tl.clamp(first * inverse, -_LARGEST, _LARGEST)
                second = tl.clamp(second * inverse, -_LARGEST, _LARGEST)
            tl.store(out + row * width + column, first.to(out.dtype.element_ty), inside)
            if GATED:
                tl.store(out + row * width + columns + column, second.to(out.dtype.element_ty), inside)


def _rows(x: Tensor, gated: bool) -> tuple[int, int]:
    """(rows, columns of y)"""
    width = x.shape[-1]
    return x.numel() // width, width // 2 if gated else width


def activate(x: Tensor, bias: Tensor | None, name: str, *, gated: bool) -> Tensor:
    """y [..., f] in x's type: x [..., f or 2 f] contiguous, bias [f or 2 f]."""
    rows, columns = _rows(x, gated)
    out = torch.empty(*x.shape[:-1], columns, dtype=x.dtype, device=x.device)
    flags = (columns, _PIECE, name, gated, bias is not None, False, False, False, False)
    _forward[(rows,)](x, bias, None, out, None, None, None, *flags, num_warps=8)
    return out


def activate_gradient(x: Tensor, bias: Tensor | None, grad: Tensor, name: str, *, gated: bool) -> Tensor:
    """dL/dx in x's shape and type, from grad = dL/dy [..., f] contiguous."""
    rows, columns = _rows(x, gated)
    out = torch.empty_like(x)
    flags = (columns, _PIECE, name, gated, bias is not None, False, False, False, False, False)
    _backward[(rows,)](x, bias, grad, None, out, None, None, None, None, *flags, num_warps=8)
    return out


def activate_in_fp8(
    x: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
    name: str,
    *,
    gated: bool,
    agree: Agree | None,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y diag(factor) as e4m3 with a scale per row: x [m, f or 2 f] -> [m, f], [m, 1] fp32; `agree` as in
    `quantise_rows`. With `keep` y itself too, in x's type."""
    rows, columns = _rows(x, gated)
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    y = torch.empty(rows, columns, dtype=x.dtype, device=x.device) if keep else None
    flags = (name, gated, bias is not None, keep, factor is not None)
    shape = (32 if gated or keep else 16, columns, _PIECE)
    return codes, _in_fp8(_forward, (x, bias, factor), codes, (y,), shape, flags, agree), y


def activate_gradient_in_fp8(
    x: Tensor,
    bias: Tensor | None,
    grad: Tensor,
    factor: Tensor | None,
    name: str,
    *,
    gated: bool,
    agree: Agree | None,
    keep: bool = False,
    keep_y: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """dL/dx diag(factor) as e4m3 with a scale per row: [m, f or 2 f], [m, 1] fp32. With `keep` dL/dx itself too, with
    `keep_y` the activation's output [m, f], both in x's type."""
    rows, columns = _rows(x, gated)
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    dx = torch.empty_like(x) if keep else None
    y = torch.empty(rows, columns, dtype=x.dtype, device=x.device) if keep_y else None
    flags = (name, gated, bias is not None, keep, keep_y, factor is not None)
    shape = (32, columns, 2 * _PIECE) if keep or keep_y else (32 if gated else 8, columns, _PIECE)
    return codes, _in_fp8(_backward, (x, bias, grad, factor), codes, (dx, y), shape, flags, agree), dx, y


def _in_fp8(
    kernel: triton.JITFunction,
    inputs: tuple[Tensor | None, ...],
    codes: Tensor,
    kept: tuple[Tensor | None, ...],
    shape: tuple[int, int, int],
    flags: tuple[object, ...],
    agree: Agree | None,
) -> Tensor:
    """Fill `codes` and what is kept beside them; return the scales.

    shape: warps of a program, columns of its row, and how many it does at a time: of those tried between products, at
    the widths of GPT-3 175B and Llama 2 70B, the fastest. More warps are fewer rows under way, which the cache holds.
    """
    rows = codes.shape[0]
    scales = torch.empty(rows, 1, dtype=torch.float32, device=codes.device)
    warps, *sizes = shape
    before, after = (*inputs, codes), (*kept, *sizes, *flags)
    if agree is None:
        kernel[(rows,)](*before, scales, None, *after, True, True, num_warps=warps)
    else:
        largest = torch.empty_like(scales)
        kernel[(rows,)](*before, largest, None, *after, True, False, num_warps=warps)
        agree(largest)
        kernel[(rows,)](*before, scales, largest, *after, False, True, num_warps=warps)
    return scales

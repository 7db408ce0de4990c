# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the MLP's activation with the FP8 rounding of what comes out of it, computed once.

The same numbers as `activation_kernels` with MEASURE and CAST, which reads and computes a row twice, for bf16 rows
that a program can hold (`storage.held_rows`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_megatron.layers.activation_kernels import _gradients, _outputs
from lora_megatron.layers.storage.held_rows import larger, packed, store_codes, store_scale

_FORWARD, _BACKWARD = (8192, 32), (4096, 16)
"""Columns at a time, and warps, of a program. Between products on an H200, GPT-3 175B's rows of 49,152 took 173 us
where reading and computing them twice took 203, and 226 for 298 backward; since then backward 233 in pieces of 4096
columns where those of 8192 took 260."""


@triton.jit
def _forward(
    x, bias, factor, codes, scales, columns: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    held = ()
    largest = tl.zeros([C], tl.float32)
    for piece in tl.static_range((columns + C - 1) // C):
        column = piece * C + tl.arange(0, C)
        value = _outputs(x, bias, row, column, column < columns, columns, KIND, GATED, BIAS)
        if FACTOR:
            value *= tl.load(factor + column, column < columns, 0.0)
        words = packed(value, C)
        largest = larger(largest, words)
        held = held + (words,)  # type: ignore[assignment]  # noqa: RUF005  # a tuple of Triton's grows by + alone
    inverse = store_scale(scales + row, largest)
    for piece in tl.static_range((columns + C - 1) // C):
        column = piece * C + tl.arange(0, C)
        store_codes(codes + row * columns + column, column < columns, held[piece], inverse)


@triton.jit
def _backward(
    x, bias, grad, factor, codes, scales, columns: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    halves: tl.constexpr = 2 if GATED else 1
    held = ()
    largest = tl.zeros([C], tl.float32)
    for piece in tl.static_range((columns + C - 1) // C):
        column = piece * C + tl.arange(0, C)
        inside = column < columns
        first, second, _ = _gradients(x, bias, grad, row, column, inside, columns, KIND, GATED, BIAS)
        if FACTOR:
            first *= tl.load(factor + column, inside, 0.0)
        words = packed(first, C)
        largest = larger(largest, words)
        held = held + (words,)  # type: ignore[assignment]  # noqa: RUF005  # a tuple of Triton's grows by + alone
        if GATED:
            if FACTOR:
                second *= tl.load(factor + columns + column, inside, 0.0)
            words = packed(second, C)
            largest = larger(largest, words)
            held = held + (words,)  # type: ignore[assignment]  # noqa: RUF005  # a tuple of Triton's grows by + alone
    inverse = store_scale(scales + row, largest)
    for piece in tl.static_range((columns + C - 1) // C):
        column = piece * C + tl.arange(0, C)
        for half in tl.static_range(halves):
            where = codes + (row * halves + half) * columns + column
            store_codes(where, column < columns, held[piece * halves + half], inverse)


def activate(x: Tensor, bias: Tensor | None, factor: Tensor | None, name: str, *, gated: bool) -> tuple[Tensor, Tensor]:
    """y diag(factor) as e4m3 with a scale per row: x [m, f or 2 f] contiguous -> [m, f], [m, 1] fp32."""
    rows, columns = x.shape[0], x.shape[1] // (2 if gated else 1)
    codes, scales = _room(x, columns)
    size, warps = _FORWARD
    flags = (columns, size, name, gated, bias is not None, factor is not None)
    _forward[(rows,)](x, bias, factor, codes, scales, *flags, num_warps=warps)
    return codes, scales


def activate_gradient(
    x: Tensor, bias: Tensor | None, grad: Tensor, factor: Tensor | None, name: str, *, gated: bool
) -> tuple[Tensor, Tensor]:
    """dL/dx diag(factor) likewise, from dL/dy [m, f] contiguous: [m, f or 2 f], [m, 1] fp32."""
    rows, columns = x.shape[0], x.shape[1] // (2 if gated else 1)
    codes, scales = _room(x, x.shape[1])
    size, warps = _BACKWARD
    flags = (columns, size, name, gated, bias is not None, factor is not None)
    _backward[(rows,)](x, bias, grad, factor, codes, scales, *flags, num_warps=warps)
    return codes, scales


def _room(x: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape[0], columns, dtype=torch.float8_e4m3fn, device=x.device)
    return codes, torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)

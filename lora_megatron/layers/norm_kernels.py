# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for LayerNorm and RMSNorm over frozen parameters; a program holds one row in registers.

    LayerNorm   y = n w + b,   n = (x - mean) / sqrt(var + eps)      RMSNorm   y = n w,   n = x / sqrt(mean(x^2) + eps)
    dx = (v - mean(v) - n mean(v n)) / sqrt(var + eps),  v = dy w;   RMSNorm has no mean(v)

Where x is the residual too, the gradient that it has as such is added to dx, in fp32, before that is rounded.

A row's statistics, 1 / sqrt(var + eps) and LayerNorm's mean, are written in fp32 for the backward kernels, which so
need not look at a row twice, nor hold a whole one (`low_rank_input_kernels`).

Where a product in FP8 reads y or dx, its codes are written with it: of what is stored, rounded, so that they are those
that `quantise_rows` would make of it.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_megatron.layers.storage.kernels import store_quantised

WIDEST = 32768
"""Columns that a program can hold."""


@triton.jit
def _norm(
    x, weight, bias, out, statistics, codes, scales, eps, width: tl.constexpr,
    CENTRED: tl.constexpr, CODES: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, SIZE)
    inside = column < width
    values = tl.load(x + row + column, inside, 0.0).to(tl.float32)
    if CENTRED:
        mean = tl.sum(values, 0) / width
        tl.store(statistics + tl.num_programs(0) + tl.program_id(0), mean)
        values = tl.where(inside, values - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(values * values, 0) / width + eps)
    tl.store(statistics + tl.program_id(0), inverse)
    n = values * inverse
    w = tl.load(weight + column, inside, 0.0).to(tl.float32)
    if CENTRED:
        n = n * w + tl.load(bias + column, inside, 0.0).to(tl.float32)
    else:  # as Llama does: rounded before the weight
        n = n.to(out.dtype.element_ty).to(tl.float32) * w
    y = n.to(out.dtype.element_ty)
    tl.store(out + row + column, y, inside)
    if CODES:
        store_quantised(y, codes, scales, tl.program_id(0), column, width)


@triton.jit
def _norm_gradient(
    x, grad, weight, statistics, beside, out, codes, scales, width: tl.constexpr,
    CENTRED: tl.constexpr, ADDED: tl.constexpr, CODES: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, SIZE)
    inside = column < width
    values = tl.load(x + row + column, inside, 0.0).to(tl.float32)
    inverse = tl.load(statistics + tl.program_id(0))
    if CENTRED:
        values -= tl.load(statistics + tl.num_programs(0) + tl.program_id(0))
    n = values * inverse
    v = tl.load(grad + row + column, inside, 0.0).to(tl.float32) * tl.load(weight + column, inside, 0.0).to(tl.float32)
    dx = v - n * (tl.sum(v * n, 0) / width)
    if CENTRED:
        dx -= tl.sum(v, 0) / width
    dx *= inverse
    if ADDED:
        dx += tl.load(beside + row + column, inside, 0.0).to(tl.float32)
    rounded = dx.to(out.dtype.element_ty)
    tl.store(out + row + column, rounded, inside)
    if CODES:
        store_quantised(rounded, codes, scales, tl.program_id(0), column, width)


def _launch(width: int) -> dict[str, int]:
    size = triton.next_power_of_2(width)
    return {"SIZE": size, "num_warps": min(16, max(1, size // 1024))}


def room_for_statistics(x: Tensor, *, centred: bool) -> Tensor:
    """Of each row of x [..., width], to be written by `norm`: fp32 [2, rows] 1 / sqrt(var + eps) and mean, or [1, rows]
    of RMSNorm."""
    return torch.empty(1 + centred, x.numel() // x.shape[-1], dtype=torch.float32, device=x.device)


Codes: TypeAlias = tuple[Tensor, Tensor]
"""Room for a tensor's FP8 codes and their scales (`storage.kernels.room_for_codes`), to be written."""


def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, statistics: Tensor, quantised: Codes | None = None
) -> Tensor:
    """LayerNorm of x [..., width] contiguous, or RMSNorm where there is no bias; its statistics are written too, and
    q(y) into `quantised`."""
    out, width = torch.empty_like(x), x.shape[-1]
    flags = (bias is not None, quantised is not None)
    room = quantised or (None, None)
    _norm[(x.numel() // width,)](x, weight, bias, out, statistics, *room, eps, width, *flags, **_launch(width))
    return out


def norm_gradient(
    x: Tensor,
    grad: Tensor,
    weight: Tensor,
    statistics: Tensor,
    *,
    centred: bool,
    beside: Tensor | None = None,
    quantised: Codes | None = None,
) -> Tensor:
    """dL/dx from dL/dy, both [..., width] contiguous, and what `norm` wrote of x; `centred` for LayerNorm. `beside`, of
    x's shape and contiguous, is added. q(dL/dx) is written into `quantised`."""
    out, width = torch.empty_like(x), x.shape[-1]
    flags = (centred, beside is not None, quantised is not None)
    room = quantised or (None, None)
    _norm_gradient[(x.numel() // width,)](
        x, grad, weight, statistics, beside, out, *room, width, *flags, **_launch(width)
    )
    return out

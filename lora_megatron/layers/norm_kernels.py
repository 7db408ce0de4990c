# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for LayerNorm and RMSNorm over frozen parameters; a program holds one row in registers.

    LayerNorm   y = n w + b,   n = (x - mean) / sqrt(var + eps)      RMSNorm   y = n w,   n = x / sqrt(mean(x^2) + eps)
    dx = (v - mean(v) - n mean(v n)) / sqrt(var + eps),  v = dy w;   RMSNorm has no mean(v)

The backward kernel computes the row's statistics again rather than reading them: the row is there anyway.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 32768
"""Columns that a program can hold."""


@triton.jit
def _normed(x, width, eps, inside, CENTRED: tl.constexpr):
    """(n, 1 / sqrt(var + eps)) of a row in fp32."""
    if CENTRED:
        x = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
    return x * inverse, inverse


@triton.jit
def _norm(x, weight, bias, out, width, eps, CENTRED: tl.constexpr, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, SIZE)
    inside = column < width
    values = tl.load(x + row + column, inside, 0.0).to(tl.float32)
    n, _ = _normed(values, width, eps, inside, CENTRED)
    w = tl.load(weight + column, inside, 0.0).to(tl.float32)
    if CENTRED:
        n = n * w + tl.load(bias + column, inside, 0.0).to(tl.float32)
    else:  # as Llama does: rounded before the weight
        n = n.to(out.dtype.element_ty).to(tl.float32) * w
    tl.store(out + row + column, n.to(out.dtype.element_ty), inside)


@triton.jit
def _norm_gradient(x, grad, weight, out, width, eps, CENTRED: tl.constexpr, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, SIZE)
    inside = column < width
    values = tl.load(x + row + column, inside, 0.0).to(tl.float32)
    n, inverse = _normed(values, width, eps, inside, CENTRED)
    v = tl.load(grad + row + column, inside, 0.0).to(tl.float32) * tl.load(weight + column, inside, 0.0).to(tl.float32)
    dx = v - n * (tl.sum(v * n, 0) / width)
    if CENTRED:
        dx -= tl.sum(v, 0) / width
    tl.store(out + row + column, (dx * inverse).to(out.dtype.element_ty), inside)


def _launch(width: int) -> dict[str, int]:
    size = triton.next_power_of_2(width)
    return {"SIZE": size, "num_warps": min(16, max(1, size // 1024))}


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm of x [..., width] contiguous, or RMSNorm where there is no bias."""
    out, width = torch.empty_like(x), x.shape[-1]
    _norm[(x.numel() // width,)](x, weight, bias, out, width, eps, bias is not None, **_launch(width))
    return out


def norm_gradient(x: Tensor, grad: Tensor, weight: Tensor, eps: float, *, centred: bool) -> Tensor:
    """dL/dx from dL/dy, both [..., width] contiguous; `centred` for LayerNorm."""
    out, width = torch.empty_like(x), x.shape[-1]
    _norm_gradient[(x.numel() // width,)](x, grad, weight, out, width, eps, centred, **_launch(width))
    return out

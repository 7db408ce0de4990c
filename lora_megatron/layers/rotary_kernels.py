# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of rotary positions; `rotary.turned` is the reference. Each element is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_HEADS = 64
"""That one program turns, by angles it computes once."""


@triton.jit
def _turn(
    x, angles, out, batch, heads, grouped, half, width, sign, x_s, x_b, x_g, x_h, angle_s, angle_b,
    H: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """H heads of one token; `half` pairs of each, and the columns behind them as they are."""
    token = tl.program_id(0).to(tl.int64)
    position, sample = token // batch, token % batch
    head = tl.program_id(1) * H + tl.arange(0, H)
    pair = tl.arange(0, HALF)
    angle = tl.load(angles + position * angle_s + sample * angle_b + pair, pair < half, 0.0)
    cos, sin = tl.cos(angle)[None, :], (tl.sin(angle) * sign)[None, :]
    source = x + position * x_s + sample * x_b + ((head // grouped) * x_g + (head % grouped) * x_h)[:, None]
    target = out + (token * heads + head[:, None]) * width
    inside = (head[:, None] < heads) & (pair[None, :] < half)
    first = tl.load(source + pair[None, :], inside, 0.0).to(tl.float32)
    second = tl.load(source + half + pair[None, :], inside, 0.0).to(tl.float32)
    tl.store(target + pair[None, :], (first * cos - second * sin).to(out.dtype.element_ty), inside)
    tl.store(target + half + pair[None, :], (second * cos + first * sin).to(out.dtype.element_ty), inside)
    if REST > 0:
        column = 2 * half + tl.arange(0, REST)
        beyond = (head[:, None] < heads) & (column[None, :] < width)
        tl.store(target + column[None, :], tl.load(source + column[None, :], beyond, 0.0), beyond)


def turn(x: Tensor, angles: Tensor, *, back: bool) -> Tensor:
    """x [s, b, heads, d], or [s, b, groups, heads of a group, d], of any strides with contiguous heads, and angles fp32
    [s, b or 1, 1, rotary] -> [s, b, heads, d] contiguous."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    if angles.dtype != torch.float32 or angles.stride(-1) != 1:
        angles = angles.float().contiguous()
    x = x.unsqueeze(2) if x.dim() == 4 else x
    s, b, groups, grouped, width = x.shape
    heads = groups * grouped
    half = angles.shape[-1] // 2
    out = torch.empty(s, b, heads, width, dtype=x.dtype, device=x.device)
    rest = width - 2 * half
    _turn[(s * b, triton.cdiv(heads, _HEADS))](
        x, angles, out, b, heads, grouped, half, width, -1.0 if back else 1.0, *x.stride()[:4],
        angles.stride(0), angles.stride(1) if angles.shape[1] > 1 else 0,
        _HEADS, triton.next_power_of_2(half), triton.next_power_of_2(rest) if rest else 0,
    )  # fmt: skip
    return out

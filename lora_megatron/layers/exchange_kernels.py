# SPDX-License-Identifier: Apache-2.0
"""A Triton kernel for what an exchange has brought: torch's own sum over a short first dimension takes three times as
long as its bytes (125 us for 2 x 2048 x 12288 in bf16 on an H100)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_PLACES = 2048


@triton.jit
def _sum_part(addends, out, places, program, COUNT: tl.constexpr, P: tl.constexpr):
    """out = addends[0] + addends[1] + ..., in fp32, rounded once."""
    place = program * P + tl.arange(0, P)
    inside = place < places
    total = tl.zeros([P], tl.float32)
    for index in tl.static_range(COUNT):
        total += tl.load(addends + index * places + place, inside, 0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), inside)


@triton.jit
def _sum_in_order(addends, out, places, beside, beside_out, more, COUNT: tl.constexpr, P: tl.constexpr):
    """A part of one sum, or in the programs behind those, of the other."""
    program, programs = tl.program_id(0).to(tl.int64), tl.cdiv(places, P)
    if program < programs:
        _sum_part(addends, out, places, program, COUNT, P)
    else:
        _sum_part(beside, beside_out, more, program - programs, COUNT, P)


def sums_in_order(addends: Sequence[Tensor]) -> list[Tensor]:
    """The sums over the first dimension of one tensor, or of two of one type, in one launch: [t, ...] -> [...],
    contiguous; not for fp64."""
    outs = [torch.empty(each.shape[1:], dtype=each.dtype, device=each.device) for each in addends]
    count, first, last = addends[0].shape[0], outs[0].numel(), outs[-1].numel() if len(outs) > 1 else 0
    programs = triton.cdiv(first, _PLACES) + triton.cdiv(last, _PLACES)
    _sum_in_order[(programs,)](addends[0], outs[0], first, addends[-1], outs[-1], last, count, _PLACES)
    return outs

# SPDX-License-Identifier: Apache-2.0
"""A Triton kernel for what an exchange has brought: torch's own sum over a short first dimension takes three times as
long as its bytes (125 us for 2 x 2048 x 12288 in bf16 on an H100)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PLACES = 2048


@triton.jit
def _sum_in_order(addends, out, places, COUNT: tl.constexpr, P: tl.constexpr):
    """out = addends[0] + addends[1] + ..., in fp32, rounded once."""
    place = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    inside = place < places
    total = tl.zeros([P], tl.float32)
    for index in tl.static_range(COUNT):
        total += tl.load(addends + index * places + place, inside, 0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), inside)


def sum_in_order(addends: Tensor) -> Tensor:
    """The sum over the first dimension [t, m, n] -> [m, n], contiguous; not for fp64."""
    out = torch.empty(addends.shape[1:], dtype=addends.dtype, device=addends.device)
    places = out.numel()
    _sum_in_order[(triton.cdiv(places, _PLACES),)](addends, out, places, addends.shape[0], _PLACES)
    return out

# SPDX-License-Identifier: Apache-2.0
"""A Triton kernel that drops values by counter-based random numbers (Philox): no mask is drawn beforehand or kept.

The counter of a value is its place in the whole sample, position x width + feature, so every cut of the sample over
ranks gives its values the same fate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 1024


@triton.jit(do_not_specialize=["seed"])
def _drop(x, out, seed, p, row_size, width, whole_width, first_row, first_column, C: tl.constexpr):
    step = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * C + tl.arange(0, C)
    place = (first_row + step) * whole_width + first_column + column
    keep = tl.rand(seed, place) >= p
    value = tl.load(x + step * row_size + column, column < width, 0.0).to(tl.float32)
    value = tl.where(keep, value / (1.0 - p), 0.0)
    tl.store(out + step * row_size + column, value.to(out.dtype.element_ty), column < width)


def drop(x: Tensor, seeds: Sequence[int], p: float, *, sequence: tuple[int, int], features: tuple[int, int]) -> Tensor:
    """x [s, b, n] contiguous; a seed for each of the b samples; the cuts as in `Dropout`."""
    steps, batch, width = x.shape
    out = torch.empty_like(x)
    for sample, seed in enumerate(seeds):
        _drop[(steps, triton.cdiv(width, _COLUMNS))](
            x[:, sample], out[:, sample], seed, p, batch * width, width, width * features[1],
            steps * sequence[0], width * features[0], _COLUMNS,
        )  # fmt: skip
    return out

# SPDX-License-Identifier: Apache-2.0
"""A Triton kernel that adds the rows of one product to the gradients of up to three factors in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

_PLACES = 2048
MOST = 3
"""Factors of one launch."""


@triton.jit
def _add_rows(addend, sum0, sum1, sum2, n0, n1, n2, P: tl.constexpr):
    """sum0, sum1 and sum2, of so many places each, += their parts of `addend`, where they lie one after the other."""
    which = tl.program_id(1)
    out, places, first = sum0, n0, n0 * 0
    if which == 1:
        out, places, first = sum1, n1, n0
    if which == 2:
        out, places, first = sum2, n2, n0 + n1
    place = tl.program_id(0) * P + tl.arange(0, P)
    inside = place < places
    value = tl.load(out + place, inside, 0.0) + tl.load(addend + first + place, inside, 0.0)
    tl.store(out + place, value, inside)


def add_rows(sums: Sequence[Tensor], addend: Tensor) -> None:
    """Each of `sums` [r, n] += its rows of `addend` [sum of r, n], in order; fp32, contiguous, under 2^31 numbers and
    more than one each, which the compiler would take for a constant."""
    assert 0 < len(sums) <= MOST
    assert all(t.is_contiguous() for t in (*sums, addend))
    sizes = [one.numel() for one in sums]
    assert min(sizes) > 1
    assert addend.numel() < 2**31
    others = MOST - len(sums)  # which no program looks at
    _add_rows[(triton.cdiv(max(sizes), _PLACES), len(sums))](
        addend, *sums, *[sums[0]] * others, *sizes, *[0] * others, _PLACES
    )

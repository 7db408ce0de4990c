# SPDX-License-Identifier: Apache-2.0
"""Triton functions of kernels that hold a row in registers, in bf16, until its scale is known and its FP8 codes are.

The other way is to read a row twice and to compute it twice: the second reading comes from the cache, but so do the
factors of its columns, twice as many bytes as the row, and an activation takes more instructions than its bytes take
time. 512 threads or 1,024 hold rows of up to 65,536 numbers, two in a register.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = tl.constexpr(448.0)  # of e4m3
SMALLEST = tl.constexpr(1e-30)  # as in `fp8`
WIDEST = 65536
"""Numbers that a program can hold."""
_KNOWS_TUPLES = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)
"""Triton, before which a kernel could not keep a row in pieces (torch 2.6 brings 3.2)."""


def can_hold(x: Tensor, numbers: int) -> bool:
    """Whether a program holds so many numbers that are made of a row of x, rounded to its type."""
    return _KNOWS_TUPLES and x.dtype == torch.bfloat16 and numbers <= WIDEST


@triton.jit
def packed(values, C: tl.constexpr):
    """[C] -> [C / 2] words of two neighbours each, rounded to bf16."""
    first, second = tl.split(tl.reshape(values.to(tl.bfloat16), [C // 2, 2]))
    low = first.to(tl.uint16, bitcast=True).to(tl.uint32)
    return low | (second.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)


@triton.jit
def _unpacked(words):
    """The inverse, in fp32."""
    low = (words << 16).to(tl.float32, bitcast=True)
    high = (words & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.interleave(low, high)


@triton.jit
def larger(largest, words):
    """[C]: of the magnitudes so far, and of these."""
    return tl.maximum(largest, tl.abs(_unpacked(words)))


@triton.jit
def store_scale(where, largest):
    """The row's, as `fp8.scale_of`, to `where`; its inverse, exact: Triton's own division is approximate."""
    scale = tl.max(largest, 0)
    scale = tl.where(scale > SMALLEST, tl.div_rn(scale, LARGEST), 1.0)
    tl.store(where, scale)
    return tl.div_rn(1.0, scale)


@triton.jit
def store_codes(codes, inside, words, inverse):
    """Of [C] numbers, where `codes` points; inverse: of the scale."""
    values = tl.clamp(_unpacked(words) * inverse, -LARGEST, LARGEST)
    tl.store(codes, values.to(codes.dtype.element_ty), inside)

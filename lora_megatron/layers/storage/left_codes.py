# SPDX-License-Identifier: Apache-2.0
"""FP8 codes that whoever made a tensor left for the product that reads it.

    maker     y, and q(y) while y's rows are in registers         `leave(y, q(y))`
    reader    q(x), x a view of y or y itself                     `take(x)`, else it quantises x

Between the two lie functions that know nothing of it: they hand y on as it is, or a view. So the codes are tied to y's
memory, not to a tensor object: the storage holds them, and they are gone with it. Taken, they are gone from there.

What is read may not be what was quantised any more. The codes are given out only for the values that they are of:

- x covers all of y's elements, in their order and in rows of the same width and type;
- y itself is still there and was not changed in place, nor was x, by torch's counts of changes (`_version`). Views
  share y's count; what has one of its own (`_unsafe_view`, `.data`) is looked at by itself.

Nobody counts what a kernel of our own writes over a tensor, nor what is written through `.data` of it, which autograd
does not notice either: what leaves codes beside y may not be followed by such a write before y is read.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import TensorWeakRef

_NAME = "left_fp8_codes"


class Quantised(NamedTuple):
    """A matrix in FP8 with a scale for every row: codes [m, k] e4m3, scale [m, 1] fp32."""

    codes: Tensor
    scale: Tensor


class _Left(NamedTuple):
    quantised: Quantised
    y: TensorWeakRef
    version: int


def leave(y: Tensor, quantised: Quantised) -> None:
    """For whoever multiplies y [..., k] contiguous in FP8 with a scale per token and no other factor: q(y) [m, k]."""
    assert y.is_contiguous()
    assert quantised.codes.shape == (y.numel() // y.shape[-1], y.shape[-1])
    if y.is_inference():  # nobody counts its changes
        return
    setattr(y.untyped_storage(), _NAME, _Left(quantised, TensorWeakRef(y), y._version))


def take(x: Tensor) -> Quantised | None:
    """q(x) [m, k] of x [m, k], if it was left and x is what it was of: once. Otherwise what was left is dropped."""
    left: _Left | None = vars(x.untyped_storage()).pop(_NAME, None)
    if left is None or x.is_inference():
        return None
    y = left.y()
    if y is None or not (y._version == x._version == left.version):
        return None
    same_place = x.data_ptr() == y.data_ptr() and x.dtype == y.dtype and x.is_contiguous()
    return left.quantised if same_place and x.shape == left.quantised.codes.shape else None

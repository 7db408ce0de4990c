# SPDX-License-Identifier: Apache-2.0
"""The two products of a frozen output layer, for `layers.vocabulary_loss`: as the weight is, or in FP8.

    z = x W^T       x [n, h], W [V/t, h], this rank's rows -> z [n, V/t]
    dx = dz W       dz [n, V/t] -> [n, h], a part of a sum over ranks

In FP8 (`storage.fp8`, one scale a row of W, one a token)

    z = q(x) Q^T diag(s)
    dx = q(o diag(s)) Q + c s_l Q_l       o: dz without its label's column l, c = dz_l

The label's column is apart as dz = p - 1[v = label] has one entry near -1 beside probabilities far below it. A token's
scale is that of its largest entry; what lies below 3e-5 of it is rounded to fewer bits and below 2e-6 to zero: with the
label in, probabilities of many tokens. Without it the scale is that of the likeliest other token, and the label's part
is exact but for Q. (p alone, with the label's row of W subtracted afterwards, is no remedy: where the model is sure of
the label the two nearly cancel, and all other columns have been rounded away beside p_label.)

What the roundings of dz do to dx, norm over norm, against the same p and Q (`tests/layers/test_output_products.py`:
16,000 tokens, width 256, rows of W with a common direction; logits that are flat, fall off as Zipf's law or more
steeply, or are sure of the label or of another token): at most 0.6% as above; 1.8% with the label in; 3.3 times dx for
p alone. Against W, not Q, it is 2.9% to 3.0% as above and up to 3.5% with the label in: what is left is the rounding of
the label's row to e4m3. With p from logits in FP8 too, of spread 2.6, dx is off by 3.5% of fp64's, a token's loss by
0.07, and the mean loss of 64 tokens by 0.007 of 7.5.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_megatron.layers.smoothing import Labels
from lora_megatron.layers.storage.fp8 import StoredFp8


class OutputProducts(ABC):
    """Of one rank's rows of W."""

    @property
    @abstractmethod
    def columns(self) -> int:
        """V/t."""

    @abstractmethod
    def logits(self, x: Tensor, out: Tensor) -> None:
        """x W^T: [n, h] -> `out` [n, V/t]."""

    @abstractmethod
    def hidden_gradient(self, dz: Tensor, labels: Labels) -> Tensor:
        """dz W: [n, V/t] -> [n, h]. `labels` are those of the n tokens; dz may be written over."""


@dataclass(frozen=True)
class PlainOutputProducts(OutputProducts):
    """In the precision of `weight` [V/t, h]."""

    weight: Tensor

    @property
    def columns(self) -> int:
        return self.weight.shape[0]

    def logits(self, x: Tensor, out: Tensor) -> None:
        torch.mm(x, self.weight.t(), out=out)

    def hidden_gradient(self, dz: Tensor, labels: Labels) -> Tensor:
        return dz @ self.weight


@dataclass(frozen=True)
class Fp8OutputProducts(OutputProducts):
    """In FP8; a token's scale is agreed over the tensor ranks, so that results do not depend on their number."""

    stored: StoredFp8

    @property
    def columns(self) -> int:
        return self.stored.shape[0]

    def logits(self, x: Tensor, out: Tensor) -> None:
        product = self.stored.forward_product(out.dtype)
        product.into(out, *product.parts(x))

    def hidden_gradient(self, dz: Tensor, labels: Labels) -> Tensor:
        at_label, here = dz.gather(1, labels.column), labels.here.unsqueeze(1)
        # Where the label is another rank's, its stand-in is a column like any other.
        dz.scatter_(1, labels.column, (at_label * (1 - here)).to(dz.dtype))
        product = self.stored.backward_product(dz.dtype)
        others = product.of(*product.parts(dz))
        row = self.stored.rows(labels.column.squeeze(1))
        return row.mul_(at_label * here).add_(others).to(dz.dtype)

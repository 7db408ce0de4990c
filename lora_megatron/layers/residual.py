# SPDX-License-Identifier: Apache-2.0
"""h = residual + y + c + s u B^T after a row layer: bias, residual and the adapter's update in one pass over y.

megatron-core's attention and MLP hand on a pair, a row layer's output and the bias that is left to add, and its layer
gives the pair to the addition that the spec names. A row layer with `skip_update_add` puts its update in the bias's
place, bias and all, and `get_residual_add` is the addition that knows it. What else comes in a pair is megatron-core's.

The residual is the input of the norm before the branch, and is taken over from that (`layers.rebuilt`).

Dropout of hidden states drops from y + c + s u B^T: then the update is added first, and the rest as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from torch import Tensor

from lora_megatron.layers.low_rank import Update, add_low_rank
from lora_megatron.layers.rebuilt import taken_over


@dataclass(frozen=True)
class BiasAndUpdate:
    """All that is still to be added to an output [..., h] that nobody else reads: a bias [h] and an update."""

    bias: Tensor | None
    update: Update
    recorded: bool
    """Whether autograd recorded the layer. megatron-core has it record the addition always, in an evaluation too, where
    every layer's u would then be kept for a backward pass that never comes."""

    @classmethod
    def of(cls, bias: Tensor | None, update: Update) -> BiasAndUpdate:
        """By a layer that runs now."""
        return cls(bias, update, torch.is_grad_enabled())


LeftToAdd: TypeAlias = Tensor | BiasAndUpdate | None
"""What comes beside a row layer's output."""


def get_residual_add(training: bool, fused: bool) -> Callable[[tuple[Tensor, Any], Tensor, float], Tensor]:
    """In the place of megatron-core's `get_bias_dropout_add`: a function of an output y [s or s/t, b, h] and what is
    left to add to it, the residual, of y's shape, and the probability of dropout. It may write over y.

    training: whether dropout drops. fused: whether megatron-core's own addition is compiled.
    """
    others = get_bias_dropout_add(training, fused)

    def add(pair: tuple[Tensor, Any], residual: Tensor, probability: float) -> Tensor:
        y, left = pair
        residual = taken_over(residual)
        if not isinstance(left, BiasAndUpdate):
            result: Tensor = others(pair, residual, probability)
            return result
        drops = training and probability > 0
        # Without our kernel, the compiled addition rounds once where torch's operations do so twice.
        apart = drops or y.dtype != residual.dtype or (fused and not left.update.by_kernel(y))
        with torch.set_grad_enabled(left.recorded):
            if not apart:
                return add_low_rank(y, left.update, residual=residual, bias=left.bias)
            y = add_low_rank(y, left.update)
        result = others((y, left.bias), residual, probability)
        return result

    return add

# SPDX-License-Identifier: Apache-2.0
"""u = drop(x) A^T for all adapters of a layer, keeping of x only what is not kept anyway.

forward     u = d A^T            d = drop(x): [s, b, in], A [sum of r, in]
backward    dA = du^T d,   dx = drop(du A)          under DDP, dA is added to its fp32 sum here and now (`main_grad`)

The dropout mask is a function of the sample (`layers.dropout`) and is drawn again. x itself is computed again where it
came from a norm or an activation (`rebuilt`), whose input is kept already.

x is handed on to the layer's large product, so that its gradient comes back through here: du A is added to it where it
lies, instead of to a tensor as large as x that autograd then sums with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_megatron.layers.dropout import Dropout
from lora_megatron.layers.main_grad import gradients_of_rows
from lora_megatron.layers.rebuilt import recipe_or_itself


class _LowRankInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: Dropout | None, *factors: Tensor) -> tuple[Tensor, Tensor]:
        recipe = recipe_or_itself(x)
        ctx.step, ctx.dropout, ctx.factors = recipe.step, dropout, factors
        ctx.save_for_backward(*factors, *recipe.ingredients)  # factors for autograd to notice if they change
        ctx.set_materialize_grads(False)
        return torch.matmul(x if dropout is None else dropout(x), stacked(factors).t()), x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        du, grad_x = grads
        factors = ctx.factors  # the parameters themselves, for their `main_grad`
        kept = ctx.saved_tensors[len(factors) :]
        if du is None:
            return grad_x, None, *(None for _ in factors)
        if ctx.needs_input_grad[0]:
            grad_x = add_input_gradient(grad_x, du, stacked(factors), ctx.dropout)
        x = ctx.step.value(*kept)
        x = x if ctx.dropout is None else ctx.dropout(x)
        return grad_x, None, *factor_gradients(factors, du, x)


def stacked(factors: Sequence[Tensor]) -> Tensor:
    """All A's: [sum of r, in]."""
    return factors[0] if len(factors) == 1 else torch.cat(tuple(factors))


def factor_gradients(factors: Sequence[Tensor], du: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """What autograd is handed for each A [r, in], from du [..., sum of r] and x [..., in]: one product for all."""
    return gradients_of_rows(factors, du.reshape(-1, du.shape[-1]).t(), x.reshape(-1, x.shape[-1]))


def add_input_gradient(grad_x: Tensor | None, du: Tensor, a: Tensor, dropout: Dropout | None) -> Tensor:
    """grad_x + drop(du A), written over grad_x: nothing else reads what the product `x` was handed on to made."""
    if dropout is not None or grad_x is None or not grad_x.is_contiguous():
        added = torch.matmul(du, a)
        added = added if dropout is None else dropout(added)
        return added if grad_x is None else added.add_(grad_x)
    grad_x.view(-1, grad_x.shape[-1]).addmm_(du.reshape(-1, du.shape[-1]), a)
    return grad_x


def low_rank_input(x: Tensor, factors: Sequence[Tensor], dropout: Dropout | None) -> tuple[Tensor, Tensor]:
    """u [s, b, sum of r] from x [s, b, in] and each adapter's A [r, in], read once for all of them; and x, for one
    product, whose gradient of it must be a tensor of its own: du A is added to that in place."""
    u, handed_on = _LowRankInput.apply(x, dropout, *factors)
    return u, handed_on if x.requires_grad else x  # factors that train give what is handed on a gradient too

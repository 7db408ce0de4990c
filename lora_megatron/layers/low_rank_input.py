# SPDX-License-Identifier: Apache-2.0
"""u = drop(x) A^T for all adapters of a layer, keeping of x only what is not kept anyway.

forward     u = d A^T            d = drop(x): [s, b, in], A [sum of r, in]
backward    dA = du^T d,   dx = drop(du A)

The dropout mask is a function of the sample (`layers.dropout`) and is drawn again. x itself is computed again where it
came from a norm or an activation (`rebuilt`), whose input is kept already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_megatron.layers.dropout import Dropout
from lora_megatron.layers.rebuilt import recipe_of


class _LowRankInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: Dropout | None, *factors: Tensor) -> Tensor:
        recipe = recipe_of(x)
        ctx.step, ctx.dropout = None if recipe is None else recipe.step, dropout
        kept = (x,) if recipe is None else recipe.ingredients
        ctx.save_for_backward(*factors, *kept)
        return torch.matmul(x if dropout is None else dropout(x), torch.cat(factors).t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        du = grads[0]
        count = len(ctx.needs_input_grad) - 2
        factors, kept = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.matmul(du, torch.cat(factors))
            grad_x = grad_x if ctx.dropout is None else ctx.dropout(grad_x)
        x = kept[0] if ctx.step is None else ctx.step.value(*kept)
        x = x if ctx.dropout is None else ctx.dropout(x)
        grad_a = du.reshape(-1, du.shape[-1]).t() @ x.reshape(-1, x.shape[-1])  # [sum of r, in]
        return grad_x, None, *grad_a.split([factor.shape[0] for factor in factors])


def low_rank_input(x: Tensor, factors: Sequence[Tensor], dropout: Dropout | None) -> Tensor:
    """u [s, b, sum of r] from x [s, b, in] and each adapter's A [r, in]; x is read once for all of them."""
    u: Tensor = _LowRankInput.apply(x, dropout, *factors)
    return u

# SPDX-License-Identifier: Apache-2.0
"""u = drop(x) A^T for all adapters of a layer, keeping of x only what is not kept anyway.

forward     u = d A^T            d = drop(x): [s, b, in], A [sum of r, in]
backward    dA = du^T d,   dx = drop(du A)          under DDP, dA is added to its fp32 sum here and now (`main_grad`)

The dropout mask is a function of the sample (`layers.dropout`) and is drawn again. x itself is computed again where it
came from a norm or an activation (`rebuilt`), whose input is kept already; a norm's not even that where there is a
kernel for dA, which norms what it reads (`low_rank_input_kernels.can_take`, and without dropout).

x is handed on to the layer's large product, so that its gradient comes back through here: du A is added to it where it
lies, instead of to a tensor as large as x that autograd then sums with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_megatron.layers.aside import FOR_THE_END
from lora_megatron.layers.dropout import Dropout
from lora_megatron.layers.main_grad import already_added, gradients_of_rows, main_grads_of
from lora_megatron.layers.norm import NormedRows, normed_rows, without_codes
from lora_megatron.layers.rebuilt import recipe_or_itself

try:
    from lora_megatron.layers import low_rank_input_kernels as kernels
except ImportError:  # no Triton: the same, through general products
    kernels = None  # type: ignore[assignment]  # mypy takes the name for a module; None is what is asked for below


class _LowRankInput(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropout: Dropout | None, product_adds: bool, *factors: Tensor
    ) -> tuple[Tensor, Tensor]:
        recipe = recipe_or_itself(x)
        ctx.step = without_codes(recipe.step)
        ctx.dropout, ctx.factors, ctx.product_adds = dropout, factors, product_adds
        ctx.save_for_backward(*factors, *recipe.ingredients)  # factors for autograd to notice if they change
        ctx.set_materialize_grads(False)
        return torch.matmul(x if dropout is None else dropout(x), stacked(factors).t()), x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        du, grad_x = grads
        factors = ctx.factors  # the parameters themselves, for their `main_grad`
        kept = ctx.saved_tensors[len(factors) :]
        if du is None:
            return grad_x, None, None, *(None for _ in factors)
        if ctx.needs_input_grad[0] and not ctx.product_adds:
            grad_x = add_input_gradient(grad_x, du, factors, ctx.dropout)
        rows = normed_rows(ctx.step, kept) if ctx.dropout is None else None
        if rows is not None and kernels is not None and kernels.can_take(rows.h, du, factors):
            return grad_x, None, None, *_gradients_through_norm(factors, du, rows)
        x = ctx.step.value(*kept)
        x = x if ctx.dropout is None else ctx.dropout(x)
        return grad_x, None, None, *factor_gradients(factors, du, x)


def stacked(factors: Sequence[Tensor]) -> Tensor:
    """All A's: [sum of r, in]."""
    return factors[0] if len(factors) == 1 else torch.cat(tuple(factors))


def factor_gradients(factors: Sequence[Tensor], du: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """What autograd is handed for each A [r, in], from du [..., sum of r] and x [..., in]: one product for all."""
    return gradients_of_rows(factors, du.reshape(-1, du.shape[-1]).t(), x.reshape(-1, x.shape[-1]))


def _gradients_through_norm(factors: Sequence[Tensor], du: Tensor, rows: NormedRows) -> tuple[Tensor, ...]:
    """As `factor_gradients`, where x is the norm of these rows."""
    mains = main_grads_of(factors)
    flat = du.reshape(-1, du.shape[-1]).contiguous()
    if mains is None:
        return kernels.factor_gradients_of_normed(rows, flat, factors, None)
    FOR_THE_END.do(partial(kernels.factor_gradients_of_normed, rows, flat, factors, mains))
    return already_added(factors)


def add_input_gradient(grad_x: Tensor | None, du: Tensor, factors: Sequence[Tensor], dropout: Dropout | None) -> Tensor:
    """grad_x + drop(du A) of all A's [r, in], from du [..., sum of r]; written over grad_x: nothing else reads what the
    product `x` was handed on to made."""
    if dropout is not None or grad_x is None or not grad_x.is_contiguous():
        added = torch.matmul(du, stacked(factors))
        added = added if dropout is None else dropout(added)
        return added if grad_x is None else added.add_(grad_x)
    rows, flat = grad_x.view(-1, grad_x.shape[-1]), du.reshape(-1, du.shape[-1])
    if kernels is not None and kernels.can_take(rows, flat, factors) and all(a.is_contiguous() for a in factors):
        kernels.add_to_input_gradient(rows, flat.contiguous(), factors)
    else:
        rows.addmm_(flat, stacked(factors))
    return grad_x


def low_rank_input(
    x: Tensor, factors: Sequence[Tensor], dropout: Dropout | None, *, product_adds: bool = False
) -> tuple[Tensor, Tensor]:
    """u [s, b, sum of r] from x [s, b, in] and each adapter's A [r, in], read once for all of them; and x, for one
    product, whose gradient of it must be a tensor of its own: du A is added to that in place.

    product_adds: the product gives x's gradient with du A in it (without dropout alone): that is not added here.
    """
    assert dropout is None or not product_adds
    u, handed_on = _LowRankInput.apply(x, dropout, product_adds, *factors)
    return u, handed_on if x.requires_grad else x  # factors that train give what is handed on a gradient too

# SPDX-License-Identifier: Apache-2.0
"""fc2(act(fc1(x))) of two frozen weights as one function, with adapters or without.

    z = x W1^T + s u1 B1^T        u1 = x A1^T; of sequence shards both gathered together
    y = act(z + c)
    out = y W2^T,  u2 = drop(y) A2^T        both this rank's part of a sum; of sequence shards summed together

What stands between the two products is `adapted_activation`.

For the backward pass z is kept, the largest tensor of a layer, and what the adapters keep anyway; or, with `rebuild`,
what x was made of instead, which its norm keeps too, and z is made again: one product, under sequence parallelism with
its gather of x. The same operations on the same numbers give the same z. Dropout has no part in it, as u1 of all tokens
is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lora_megatron.layers.activation import Activation
from lora_megatron.layers.adapted_activation import AdaptedActivation, Rows
from lora_megatron.layers.column import LoraColumnParallelLinear
from lora_megatron.layers.dropout import Dropout
from lora_megatron.layers.frozen import backward_product, forward_product
from lora_megatron.layers.low_rank import Update
from lora_megatron.layers.qkv import Part
from lora_megatron.layers.rebuilt import Recipe, recipe_or_itself
from lora_megatron.layers.row import LoraRowParallelLinear
from lora_megatron.layers.sequence_shards import SequenceShards
from lora_megatron.layers.storage.product import Product


@dataclass(frozen=True)
class _Plan:
    """All that is not kept for the backward pass."""

    fc1: Tensor
    fc2: Tensor
    """This rank's frozen weights, or the handles of stored ones."""
    activation: Activation
    sum_input_gradient_over: dist.ProcessGroup | None
    shards: SequenceShards | None
    """Where input and output are sequence shards."""
    parts: tuple[Part, ...]
    scales: tuple[float, ...]
    """Of fc1's adapters."""
    factors: tuple[Tensor, ...]
    """A's of fc1 whose du A is to be part of the gradient of x."""
    dropout: Dropout | None
    """Of fc2's."""

    def between(
        self, bias: Tensor | None, u: Tensor | None, a: Tensor | None, bs: tuple[Tensor, ...]
    ) -> AdaptedActivation:
        """What stands between the products; u of all tokens."""
        update = None if u is None else Update(self.parts, self.scales, u, bs)
        aside = self.shards is not None and self.shards.exchange is not None
        return AdaptedActivation(self.activation, self.fc1, self.fc2, bias, update, a, self.dropout, aside)

    def of_all(self, product: Product, x: Tensor, beside: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Of the tokens of all ranks, where x are this rank's own, and so is what goes beside them. A product may hold
        an unpacked weight: it is not to outlive the call."""
        rows = product.parts(x.reshape(-1, x.shape[-1]))
        if self.shards is None:
            return product.of(*rows), beside
        return self.shards.product_of_all(product, *rows, beside=beside)

    def summed(
        self, product: Product, rows: Rows, beside: Tensor | None, factors: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """This rank's parts of two sums; with sequence shards the sums, of its own tokens, and with the second one's
        product with `factors` in the first."""
        if self.shards is None:
            return product.of(*rows), beside
        return self.shards.sum_of_products(product, *rows, beside=beside, factors=factors)


class _FrozenMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        recipe: Recipe | None,
        x: Tensor,
        bias: Tensor | None,
        u: Tensor | None,
        a: Tensor | None,
        *bs: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        z, u = plan.of_all(forward_product(plan.fc1, x.dtype), x, u)
        between = plan.between(bias, u, a, bs)
        z = between.kept(z)
        ctx.plan, ctx.step = plan, None if recipe is None else recipe.step
        ctx.a, ctx.bs = a, bs  # the parameters themselves, for their `main_grad`
        ctx.save_for_backward(bias, u, a, *bs, *((z,) if recipe is None else recipe.ingredients))
        rows, u2 = between.forward(z, (-1, *x.shape[1:-1]))
        if recipe is not None:
            del z
        output, u2 = plan.summed(forward_product(plan.fc2, x.dtype), rows, u2)
        return output.view(*x.shape[:-1], -1), u2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad, du2 = grads
        plan, leading = ctx.plan, (-1, *grad.shape[1:-1])
        a, bs = ctx.a, ctx.bs
        bias, u, _, *rest = ctx.saved_tensors
        between = plan.between(bias, u, a, bs)
        kept = rest[len(bs) :]
        if ctx.step is None:
            (z,) = kept
        else:
            x = ctx.step.value(*kept)
            z = between.kept(plan.of_all(forward_product(plan.fc1, x.dtype), x)[0])
            del x
        if ctx.needs_input_grad[2] or u is not None:
            dy, du2 = plan.of_all(backward_product(plan.fc2, grad.dtype), grad, du2)
            rows, du, dbs, da = between.backward(z, dy, du2, leading)
            del dy, z, kept, rest
            grad_x, du = _FrozenMlp._of_input(ctx, rows, du, leading, grad.dtype)
            return None, None, grad_x, None, du, da, *dbs
        if plan.shards is not None:
            du2 = plan.shards.of_all(du2)
        da = None if a is None else between.factor_gradient(z, du2, leading)
        return None, None, None, None, None, da

    @staticmethod
    def _of_input(
        ctx: Any, rows: Rows, du: Tensor | None, leading: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        """dL/dx, and du of this rank's tokens."""
        plan = ctx.plan
        if not ctx.needs_input_grad[2]:
            return None, du if du is None or plan.shards is None else plan.shards.sum_of(du)
        grad_x, du = plan.summed(backward_product(plan.fc1, dtype), rows, du, plan.factors)
        if plan.sum_input_gradient_over is not None:
            dist.all_reduce(grad_x, group=plan.sum_input_gradient_over)
        return grad_x.view(*leading, grad_x.shape[-1]), du


def frozen_mlp(
    x: Tensor, fc1: LoraColumnParallelLinear, fc2: LoraRowParallelLinear, activation: Activation, *, rebuild: bool
) -> tuple[Tensor, Tensor | None]:
    """x [s or s/t, b, h] -> (the output, and fc2's u, None where fc2 has no adapter): this rank's parts of sums
    [s, b, h] and [s, b, r], or with sequence shards, the sums [s/t, b, h] and [s/t, b, r].

    rebuild: make fc1's output again in the backward pass instead of keeping it.
    """
    # Before fc1's adapters read x: what they hand on is x, but no longer tells how it was made.
    recipe = recipe_or_itself(x) if rebuild else None
    u, update = None, None
    factors: tuple[Tensor, ...] = ()
    if fc1.adapters:
        u, x, factors = fc1.low_rank_input(x)
        update = fc1.low_rank_update(u)
    plan = _Plan(
        fc1.weight,
        fc2.weight,
        activation,
        fc1.tp_group if fc1.allreduce_dgrad else None,
        fc1.shards if fc1.sequence_parallel else None,
        parts=() if update is None else update.parts,
        scales=() if update is None else update.scales,
        factors=factors,
        dropout=fc2.dropout_now() if fc2.adapters else None,
    )
    bs = () if update is None else update.bs
    a = fc2.pair.lora_A if fc2.adapters else None
    result: tuple[Tensor, Tensor | None] = _FrozenMlp.apply(plan, recipe, x, fc1.bias, u, a, *bs)
    return result

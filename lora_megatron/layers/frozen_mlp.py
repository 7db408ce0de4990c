# SPDX-License-Identifier: Apache-2.0
"""fc2(act(fc1(x))) of two frozen weights as one function, with adapters or without.

    z = x W1^T + s u1 B1^T        u1 = x A1^T; of sequence shards both gathered together
    y = act(z + c)
    out = y W2^T,  u2 = drop(y) A2^T        both this rank's part of a sum; of sequence shards summed together

Of FP8 weights the products want y and dL/dz only as codes, which are computed in the same pass; y is written where
fc2's adapter reads it, dL/dz where fc1's does.

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
from lora_megatron.layers.column import LoraColumnParallelLinear
from lora_megatron.layers.dropout import Dropout
from lora_megatron.layers.frozen import backward_product, forward_product
from lora_megatron.layers.low_rank import Update
from lora_megatron.layers.low_rank_input import add_input_gradient, factor_gradients
from lora_megatron.layers.qkv import Part
from lora_megatron.layers.rebuilt import Recipe, recipe_or_itself
from lora_megatron.layers.row import LoraRowParallelLinear
from lora_megatron.layers.sequence_shards import SequenceShards
from lora_megatron.layers.storage.fp8 import Fp8Products
from lora_megatron.layers.storage.product import Product
from lora_megatron.layers.storage.quantised_activation import activated, activation_gradient
from lora_megatron.layers.storage.stored import stored_of

_Rows = tuple[Tensor, ...]


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
    dropout: Dropout | None
    """Of fc2's."""

    def z(self, x: Tensor, u: Tensor | None, bs: tuple[Tensor, ...]) -> Tensor:
        """fc1's output without its bias [m, f/t or 2 f/t] once more, from u of all tokens."""
        return self.updated(self.of_all(forward_product(self.fc1, x.dtype), x)[0], u, bs)

    def updated(self, z: Tensor, u: Tensor | None, bs: tuple[Tensor, ...]) -> Tensor:
        """z with fc1's adapters, written over it."""
        if u is not None:
            Update(self.parts, self.scales, u, bs).add_to(z)
        return z

    def of_all(self, product: Product, x: Tensor, beside: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Of the tokens of all ranks, where x are this rank's own, and so is what goes beside them. A product may hold
        an unpacked weight: it is not to outlive the call."""
        rows = product.parts(x.reshape(-1, x.shape[-1]))
        if self.shards is None:
            return product.of(*rows), beside
        return self.shards.product_of_all(product, *rows, beside=beside)

    def summed(self, product: Product, rows: _Rows, beside: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """This rank's parts of two sums; with sequence shards the sums, of its own tokens."""
        if self.shards is None:
            return product.of(*rows), beside
        return self.shards.sum_of_products(product, *rows, beside=beside)

    def activated(self, z: Tensor, bias: Tensor | None, *, keep: bool) -> tuple[_Rows, Tensor | None]:
        """What fc2's product reads; and y with `keep`."""
        stored = stored_of(self.fc2)
        if isinstance(stored, Fp8Products):
            factor, group = stored.forward_factor(), stored.forward_group
            return activated(self.activation, z, bias, factor=factor, group=group, keep=keep)
        y = self.activation.value(z, bias)
        return (y,), y if keep else None

    def gradient(
        self, z: Tensor, bias: Tensor | None, dy: Tensor, *, keep: bool, keep_y: bool
    ) -> tuple[_Rows, Tensor | None, Tensor | None]:
        """What the product of fc1's backward pass reads; dL/dz with `keep`, and y with `keep_y`."""
        stored = stored_of(self.fc1)
        if isinstance(stored, Fp8Products):
            factor, group = stored.backward_factor(), stored.backward_group
            return activation_gradient(
                self.activation, z, bias, dy, factor=factor, group=group, keep=keep, keep_y=keep_y
            )
        dz = self.activation.gradient(z, bias, dy)
        return (dz,), dz, self.activation.value(z, bias) if keep_y else None


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
        z = plan.updated(z, u, bs)
        ctx.plan, ctx.step = plan, None if recipe is None else recipe.step
        ctx.a, ctx.bs = a, bs  # the parameters themselves, for their `main_grad`
        ctx.save_for_backward(bias, u, a, *bs, *((z,) if recipe is None else recipe.ingredients))
        rows, y = plan.activated(z, bias, keep=a is not None)
        if recipe is not None:
            del z
        u2 = None
        if a is not None and y is not None:
            u2 = _dropped(y.view(-1, *x.shape[1:-1], y.shape[-1]), plan.dropout) @ a.t()
            del y
        output, u2 = plan.summed(forward_product(plan.fc2, x.dtype), rows, u2)
        return output.view(*x.shape[:-1], -1), u2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad, du2 = grads
        plan, leading = ctx.plan, (-1, *grad.shape[1:-1])
        a, bs = ctx.a, ctx.bs
        bias, u, _, *rest = ctx.saved_tensors
        kept = rest[len(bs) :]
        z = kept[0] if ctx.step is None else plan.z(ctx.step.value(*kept), u, bs)
        needs_x = ctx.needs_input_grad[2]
        grad_x, y, du = None, None, None
        dbs: tuple[Tensor | None, ...] = (None,) * len(bs)
        if needs_x or u is not None:
            dy, du2 = plan.of_all(backward_product(plan.fc2, grad.dtype), grad, du2)
            if a is not None:
                dy = add_input_gradient(dy.view(*leading, dy.shape[-1]), du2, a, plan.dropout).view(z.shape[0], -1)
            rows, dz, y = plan.gradient(z, bias, dy, keep=u is not None, keep_y=a is not None)
            del dy
            if a is None or y is not None:
                del z, kept
            if u is not None and dz is not None:
                du, dbs = Update(plan.parts, plan.scales, u, bs).gradients(dz)
            del dz
            if needs_x:
                grad_x, du = plan.summed(backward_product(plan.fc1, grad.dtype), rows, du)
                if plan.sum_input_gradient_over is not None:
                    dist.all_reduce(grad_x, group=plan.sum_input_gradient_over)
                grad_x = grad_x.view(*leading, grad_x.shape[-1])
            elif du is not None and plan.shards is not None:
                du = plan.shards.sum_of(du)
        elif plan.shards is not None:
            du2 = plan.shards.of_all(du2)
        da = None
        if a is not None:
            y = plan.activation.value(z, bias) if y is None else y
            d = _dropped(y.view(*leading, y.shape[-1]), plan.dropout)
            (da,) = factor_gradients((a,), du2, d)
        return None, None, grad_x, None, du, da, *dbs


def _dropped(y: Tensor, dropout: Dropout | None) -> Tensor:
    return y if dropout is None else dropout(y)


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
    if fc1.adapters:
        u, x = fc1.low_rank_input(x)
        update = fc1.low_rank_update(u)
    plan = _Plan(
        fc1.weight,
        fc2.weight,
        activation,
        fc1.tp_group if fc1.allreduce_dgrad else None,
        fc1.shards if fc1.sequence_parallel else None,
        parts=() if update is None else update.parts,
        scales=() if update is None else update.scales,
        dropout=fc2.dropout_now() if fc2.adapters else None,
    )
    bs = () if update is None else update.bs
    a = fc2.pair.lora_A if fc2.adapters else None
    result: tuple[Tensor, Tensor | None] = _FrozenMlp.apply(plan, recipe, x, fc1.bias, u, a, *bs)
    return result

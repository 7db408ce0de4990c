# SPDX-License-Identifier: Apache-2.0
"""fc2(act(fc1(x))) of two frozen weights as one function, with adapters or without.

    z = x W1^T + s u1 B1^T        u1 = x A1^T after its collective (`column`)
    y = act(z + c)
    out = y W2^T,  u2 = drop(y) A2^T        both this rank's part of a sum

Of FP8 weights the products want y and dL/dz only as codes, which are computed in the same pass; y is written where
fc2's adapter reads it, dL/dz where fc1's does.

For the backward pass z is kept, the largest tensor of a layer, and what the adapters keep anyway; or, with `rebuild`,
what x was made of instead, which its norm keeps too, and z is made again: one product, under sequence parallelism with
its gather. The same operations on the same numbers give the same z. Dropout has no part in it, as u1 is kept.
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
        """fc1's output without its bias [m, f/t or 2 f/t], of the tokens of all ranks."""
        z = self.of_all(forward_product(self.fc1, x.dtype), x)
        if u is not None:
            Update(self.parts, self.scales, u, bs).add_to(z)
        return z

    def of_all(self, product: Product, x: Tensor) -> Tensor:
        """Of the tokens of all ranks, where x are this rank's own. A product may hold an unpacked weight: it is not to
        outlive the call."""
        rows = product.parts(x.reshape(-1, x.shape[-1]))
        return product.of(*rows) if self.shards is None else self.shards.product_of_all(product, *rows)

    def summed(self, product: Product, rows: _Rows) -> Tensor:
        """This rank's part of a sum; with sequence shards the sum, of its own tokens."""
        return product.of(*rows) if self.shards is None else self.shards.sum_of_products(product, *rows)

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
        z = plan.z(x, u, bs)
        ctx.plan, ctx.step = plan, None if recipe is None else recipe.step
        ctx.a, ctx.bs = a, bs  # the parameters themselves, for their `main_grad`
        ctx.save_for_backward(bias, u, a, *bs, *((z,) if recipe is None else recipe.ingredients))
        rows, y = plan.activated(z, bias, keep=a is not None)
        if recipe is not None:
            del z
        output = plan.summed(forward_product(plan.fc2, x.dtype), rows).view(*x.shape[:-1], -1)
        if a is None or y is None:
            return output, None
        return output, _dropped(y.view(-1, *x.shape[1:-1], y.shape[-1]), plan.dropout) @ a.t()

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
            dy = plan.of_all(backward_product(plan.fc2, grad.dtype), grad)
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
                grad_x = plan.summed(backward_product(plan.fc1, grad.dtype), rows)
                if plan.sum_input_gradient_over is not None:
                    dist.all_reduce(grad_x, group=plan.sum_input_gradient_over)
                grad_x = grad_x.view(*leading, grad_x.shape[-1])
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
    """x [s or s/t, b, h] -> (the output, and this rank's part of the sum that is fc2's u [s, b, r], None where fc2 has
    no adapter). The output is this rank's part of a sum too, or with sequence shards, whole [s/t, b, h].

    rebuild: make fc1's output again in the backward pass instead of keeping it.
    """
    # Before fc1's adapters read x: what they hand on is x, but no longer tells how it was made.
    recipe = recipe_or_itself(x) if rebuild else None
    update = None
    if fc1.adapters:
        update, x = fc1.low_rank_update(x)
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
    u, bs = (None, ()) if update is None else (update.u, update.bs)
    a = fc2.pair.lora_A if fc2.adapters else None
    result: tuple[Tensor, Tensor | None] = _FrozenMlp.apply(plan, recipe, x, fc1.bias, u, a, *bs)
    return result

# SPDX-License-Identifier: Apache-2.0
"""fc2(act(fc1(x))) of two frozen FP8 weights as one function, with adapters or without.

    z = x W1^T + s u1 B1^T        u1 = x A1^T after its collective (`column`)
    y = act(z + c)
    out = q(y) W2^T,  u2 = drop(y) A2^T        both this rank's part of a sum

The products want y and dL/dz only as FP8 codes, which are computed in the same pass; y is written where fc2's adapter
reads it, dL/dz where fc1's does. z is kept for the backward pass, and what the adapters keep anyway.
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
from lora_megatron.layers.low_rank import Update
from lora_megatron.layers.low_rank_input import add_input_gradient
from lora_megatron.layers.qkv import Part
from lora_megatron.layers.row import LoraRowParallelLinear
from lora_megatron.layers.sequence_shards import SequenceShards
from lora_megatron.layers.storage.fp8 import Fp8Products, Quantised
from lora_megatron.layers.storage.product import Product
from lora_megatron.layers.storage.quantised_activation import activated, activation_gradient


@dataclass(frozen=True)
class _Plan:
    """All that is no tensor."""

    fc1: Fp8Products
    fc2: Fp8Products
    activation: Activation
    sum_input_gradient_over: dist.ProcessGroup | None
    shards: SequenceShards | None
    """Where input and output are sequence shards."""
    parts: tuple[Part, ...]
    scales: tuple[float, ...]
    """Of fc1's adapters."""
    dropout: Dropout | None
    """Of fc2's."""

    def of_all(self, product: Product, x: Tensor) -> Tensor:
        """Of the tokens of all ranks, where x are this rank's own."""
        parts = product.parts(x.reshape(-1, x.shape[-1]))
        return product.of(*parts) if self.shards is None else self.shards.product_of_all(product, *parts)

    def summed(self, product: Product, quantised: Quantised) -> Tensor:
        """This rank's part of a sum; with sequence shards the sum, of its own tokens."""
        return product.of(*quantised) if self.shards is None else self.shards.sum_of_products(product, *quantised)


class _FrozenFp8(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: _Plan, x: Tensor, bias: Tensor | None, u: Tensor | None, a: Tensor | None, *bs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        fc2 = plan.fc2
        z = plan.of_all(plan.fc1.forward_product(x.dtype), x)
        if u is not None:
            Update(plan.parts, plan.scales, u, bs).add_to(z)
        ctx.plan = plan
        ctx.save_for_backward(z, bias, u, a, *bs)
        quantised, y = activated(
            plan.activation, z, bias, factor=fc2.forward_factor(), group=fc2.forward_group, keep=a is not None
        )
        output = plan.summed(fc2.forward_product(x.dtype), quantised).view(*x.shape[:-1], -1)
        if a is None or y is None:
            return output, None
        return output, _dropped(y.view(-1, *x.shape[1:-1], y.shape[-1]), plan.dropout) @ a.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad, du2 = grads
        z, bias, u, a, *bs = ctx.saved_tensors
        plan, leading = ctx.plan, (-1, *grad.shape[1:-1])
        needs_x = ctx.needs_input_grad[1]
        grad_x, y, du = None, None, None
        dbs: tuple[Tensor | None, ...] = (None,) * len(bs)
        if needs_x or u is not None:
            dy = plan.of_all(plan.fc2.backward_product(grad.dtype), grad)
            if a is not None:
                dy = add_input_gradient(dy.view(*leading, dy.shape[-1]), du2, a, plan.dropout).view(z.shape[0], -1)
            factor, group = plan.fc1.backward_factor(), plan.fc1.backward_group
            quantised, dz, y = activation_gradient(
                plan.activation, z, bias, dy, factor=factor, group=group, keep=u is not None, keep_y=a is not None
            )
            del dy
            if u is not None and dz is not None:
                du, dbs = Update(plan.parts, plan.scales, u, tuple(bs)).gradients(dz)
            del dz
            if needs_x:
                grad_x = plan.summed(plan.fc1.backward_product(grad.dtype), quantised)
                if plan.sum_input_gradient_over is not None:
                    dist.all_reduce(grad_x, group=plan.sum_input_gradient_over)
                grad_x = grad_x.view(*leading, grad_x.shape[-1])
        da = None
        if a is not None:
            y = plan.activation.value(z, bias) if y is None else y
            d = _dropped(y.view(*leading, y.shape[-1]), plan.dropout)
            da = du2.reshape(-1, du2.shape[-1]).t() @ d.reshape(-1, d.shape[-1])
        return None, grad_x, None, du, da, *dbs


def _dropped(y: Tensor, dropout: Dropout | None) -> Tensor:
    return y if dropout is None else dropout(y)


def fp8_mlp(
    x: Tensor,
    fc1: LoraColumnParallelLinear,
    fc2: LoraRowParallelLinear,
    stored: tuple[Fp8Products, Fp8Products],
    activation: Activation,
) -> tuple[Tensor, Tensor | None]:
    """x [s or s/t, b, h] -> (the output, and this rank's part of the sum that is fc2's u [s, b, r], None where fc2 has
    no adapter). The output is this rank's part of a sum too, or with sequence shards, whole [s/t, b, h]."""
    update = None
    if fc1.adapters:
        update, x = fc1.low_rank_update(x)
    plan = _Plan(
        *stored,
        activation,
        fc1.tp_group if fc1.allreduce_dgrad else None,
        fc1.shards if fc1.sequence_parallel else None,
        parts=() if update is None else update.parts,
        scales=() if update is None else update.scales,
        dropout=fc2.dropout_now() if fc2.adapters else None,
    )
    u, bs = (None, ()) if update is None else (update.u, update.bs)
    a = fc2.pair.lora_A if fc2.adapters else None
    result: tuple[Tensor, Tensor | None] = _FrozenFp8.apply(plan, x, fc1.bias, u, a, *bs)
    return result

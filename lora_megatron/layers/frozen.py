# SPDX-License-Identifier: Apache-2.0
"""A linear layer on a frozen weight: forward and the gradient of the input, never the gradient of the weight.

    y = x W^T            [s, b, in] -> [s, b, out]
    dL/dx = dL/dy W      summed over the tensor-parallel group where the input is replicated (Megatron's "f")

Only the weight is kept for the backward pass, and it is a parameter anyway: a frozen layer stores no activation. That
is where LoRA's 4N executed FLOPs per token come from, against 6N of full fine-tuning (N: linear weights). A weight in
another format (`layers.storage`) is unpacked, or multiplied as it is, in each of the two products anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from lora_megatron.layers.sequence_shards import SequenceShards
from lora_megatron.layers.storage.product import Product, product_with
from lora_megatron.layers.storage.stored import Stored, stored_of


def _shaped(output: Tensor, x: Tensor) -> Tensor:
    """output [m, n] with the leading dimensions of x. A view for us alone, as in torch's own matmul: adapters add to it
    in place, which autograd refuses for a view made in a function."""
    result: Tensor = torch.ops.aten._unsafe_view(output, [*x.shape[:-1], output.shape[-1]])
    return result


def _in_sequence(output: Tensor, x: Tensor) -> Tensor:
    """The same, with as many tokens as there are rows [m, n]."""
    result: Tensor = torch.ops.aten._unsafe_view(output, [-1, *x.shape[1:-1], output.shape[-1]])
    return result


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sum_input_gradient_over: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.group = sum_input_gradient_over
        return _shaped(functional.linear(x.reshape(-1, x.shape[-1]), weight, bias), x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        grad = grads[0]
        # Two dimensions: one GEMM, also where the incoming gradient is an expanded or transposed view.
        grad_x = (grad.reshape(-1, grad.shape[-1]) @ weight).view(*grad.shape[:-1], weight.shape[1])
        if ctx.group is not None:
            dist.all_reduce(grad_x, group=ctx.group)
        return grad_x, None, None, None


class _GatheredLinear(torch.autograd.Function):
    """A column layer over sequence shards."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shards: SequenceShards,
        u: Tensor | None,
        factors: Sequence[Tensor],
        on_own: Callable[[Tensor], object] | None,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.weight, ctx.shards, ctx.factors = weight, shards, factors
        product = forward_product(weight, x.dtype, bias)
        rows = product.parts(x.reshape(-1, x.shape[-1]))
        output, u = shards.product_of_all(product, *rows, beside=u, on_own=on_own)
        return _in_sequence(output, x), u

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, Tensor | None, None, None]:
        grad, du = grads
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, ctx.shards.sum_of(du), None, None
        product = backward_product(ctx.weight, grad.dtype)
        rows = product.parts(grad.reshape(-1, grad.shape[-1]))
        grad_x, du = ctx.shards.sum_of_products(product, *rows, beside=du, factors=ctx.factors)
        return grad_x.view(-1, *grad.shape[1:-1], grad_x.shape[-1]), None, None, None, du, None, None


class _ScatteredLinear(torch.autograd.Function):
    """A row layer whose output each rank keeps its own tokens of."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, shards: SequenceShards, u: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        ctx.weight, ctx.shards = weight, shards
        product = forward_product(weight, x.dtype)
        output, u = shards.sum_of_products(product, *product.parts(x.reshape(-1, x.shape[-1])), beside=u)
        return _in_sequence(output, x), u

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        grad, du = grads
        if not ctx.needs_input_grad[0]:
            return None, None, None, ctx.shards.of_all(du)
        product = backward_product(ctx.weight, grad.dtype)
        rows = product.parts(grad.reshape(-1, grad.shape[-1]))
        grad_x, du = ctx.shards.product_of_all(product, *rows, beside=du)
        return grad_x.view(-1, *grad.shape[1:-1], grad_x.shape[-1]), None, None, du


def forward_product(weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Product:
    """x W^T + bias of rows x [m, in] in `dtype`, whatever format the weight is kept in."""
    stored = stored_of(weight)
    return product_with(weight.t(), bias) if stored is None else stored.forward_product(dtype, bias)


def backward_product(weight: Tensor, dtype: torch.dtype) -> Product:
    """grad W of rows grad [m, out]; likewise."""
    stored = stored_of(weight)
    return product_with(weight) if stored is None else stored.backward_product(dtype)


class _StoredLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, stored: Stored, bias: Tensor | None, sum_input_gradient_over: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.stored = stored
        ctx.group = sum_input_gradient_over
        return _shaped(stored.linear(x.reshape(-1, x.shape[-1]), bias), x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grads[0]
        grad_x = ctx.stored.input_gradient(grad.reshape(-1, grad.shape[-1]))
        grad_x = grad_x.view(*grad.shape[:-1], ctx.stored.shape[1])
        if ctx.group is not None:
            dist.all_reduce(grad_x, group=ctx.group)
        return grad_x, None, None, None


def frozen_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    sum_input_gradient_over: dist.ProcessGroup | None = None,
) -> Tensor:
    """y = x W^T + bias with both frozen: x [..., in], weight [out, in], bias [out] -> [..., out].

    `sum_input_gradient_over`: the tensor-parallel group when `x` is replicated over it and `weight` is this rank's
    rows, so that each rank computes only a partial dL/dx.
    """
    assert not weight.requires_grad
    assert bias is None or not bias.requires_grad
    stored = stored_of(weight)
    if stored is not None:
        return stored_linear(x, stored, bias, sum_input_gradient_over=sum_input_gradient_over)
    result: Tensor = _FrozenLinear.apply(x, weight, bias, sum_input_gradient_over)
    return result


def stored_linear(
    x: Tensor,
    stored: Stored,
    bias: Tensor | None = None,
    *,
    sum_input_gradient_over: dist.ProcessGroup | None = None,
) -> Tensor:
    """The same of a weight in another format, wherever its shape is."""
    result: Tensor = _StoredLinear.apply(x, stored, bias, sum_input_gradient_over)
    return result


def gathered_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shards: SequenceShards,
    u: Tensor | None = None,
    factors: Sequence[Tensor] = (),
    on_own: Callable[[Tensor], object] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y = x W^T + bias of a column layer under sequence parallelism: x [s/t, b, in], this rank's tokens -> [s, b, out];
    and u [s/t, b, r], which goes beside x -> [s, b, r].

    weight, bias: this rank's rows, frozen. Gradients are summed over the ranks, each of which keeps its tokens.
    factors: A's by which u = x A^T was made, if the gradient of x through u is to be part of x's here.
    on_own: what is done in place with the output of this rank's tokens [s/t b, out] while others' are multiplied, where
        there is an exchange; for autograd it is as if it had not been.
    """
    assert not weight.requires_grad
    result: tuple[Tensor, Tensor | None] = _GatheredLinear.apply(x, weight, bias, shards, u, factors, on_own)
    return result


def scattered_linear(
    x: Tensor, weight: Tensor, shards: SequenceShards, u: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """y = x W^T of a row layer under sequence parallelism: x [s, b, in/t] -> [s/t, b, out], summed over the ranks; and
    beside it the sum of u [s, b, r] -> [s/t, b, r]."""
    assert not weight.requires_grad
    result: tuple[Tensor, Tensor | None] = _ScatteredLinear.apply(x, weight, shards, u)
    return result

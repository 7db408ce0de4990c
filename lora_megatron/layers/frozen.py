# SPDX-License-Identifier: Apache-2.0
"""A linear layer on a frozen weight: forward and the gradient of the input, never the gradient of the weight.

    y = x W^T            [s, b, in] -> [s, b, out]
    dL/dx = dL/dy W      summed over the tensor-parallel group where the input is replicated (Megatron's "f")

Only the weight is kept for the backward pass, and it is a parameter anyway: a frozen layer stores no activation. That
is where LoRA's 4N executed FLOPs per token come from, against 6N of full fine-tuning (N: linear weights). A weight in
another format (`layers.storage`) is unpacked, or multiplied as it is, in each of the two products anew.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.nn import functional

from lora_megatron.layers.storage.fp8 import Fp8Products, scatter_sum
from lora_megatron.layers.storage.stored import Stored, stored_of


def _shaped(output: Tensor, x: Tensor) -> Tensor:
    """output [m, n] with the leading dimensions of x. A view for us alone, as in torch's own matmul: adapters add to it
    in place, which autograd refuses for a view made in a function."""
    result: Tensor = torch.ops.aten._unsafe_view(output, [*x.shape[:-1], output.shape[-1]])
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
    """A column layer over sequence shards, whose tokens are gathered in FP8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Fp8Products, bias: Tensor | None, group: dist.ProcessGroup) -> Tensor:
        ctx.stored, ctx.group = stored, group
        output = stored.linear(x.reshape(-1, x.shape[-1]), bias, gather=group)
        result: Tensor = torch.ops.aten._unsafe_view(output, [-1, *x.shape[1:-1], output.shape[-1]])
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grads[0]
        grad_x = scatter_sum(ctx.stored.input_gradient(grad.reshape(-1, grad.shape[-1])), ctx.group)
        return grad_x.view(-1, *grad.shape[1:-1], grad_x.shape[-1]), None, None, None


class _ScatteredLinear(torch.autograd.Function):
    """A row layer whose output each rank keeps its own tokens of; their gradients are gathered in FP8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Fp8Products, group: dist.ProcessGroup) -> Tensor:
        ctx.stored, ctx.group = stored, group
        output = scatter_sum(stored.linear(x.reshape(-1, x.shape[-1]), None), group)
        result: Tensor = torch.ops.aten._unsafe_view(output, [-1, *x.shape[1:-1], output.shape[-1]])
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0]
        grad_x = ctx.stored.input_gradient(grad.reshape(-1, grad.shape[-1]), gather=ctx.group)
        return grad_x.view(-1, *grad.shape[1:-1], grad_x.shape[-1]), None, None


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
    result: Tensor = (
        _FrozenLinear.apply(x, weight, bias, sum_input_gradient_over)
        if stored is None
        else _StoredLinear.apply(x, stored, bias, sum_input_gradient_over)
    )
    return result


def gathered_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, group: dist.ProcessGroup) -> Tensor:
    """y = x W^T + bias of a column layer under sequence parallelism: x [s/t, b, in], this rank's tokens -> [s, b, out].

    weight, bias: this rank's rows, frozen. The gradient of x is summed over the ranks, each of which keeps its tokens.
    """
    stored = stored_of(weight)
    if not isinstance(stored, Fp8Products):
        return frozen_linear(gather_from_sequence_parallel_region(x, group=group), weight, bias)
    result: Tensor = _GatheredLinear.apply(x, stored, bias, group)
    return result


def scattered_linear(x: Tensor, weight: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """y = x W^T of a row layer under sequence parallelism: x [s, b, in/t] -> [s/t, b, out], summed over the ranks."""
    stored = stored_of(weight)
    if not isinstance(stored, Fp8Products):
        return reduce_scatter_to_sequence_parallel_region(frozen_linear(x, weight), group=group)
    result: Tensor = _ScatteredLinear.apply(x, stored, group)
    return result

# SPDX-License-Identifier: Apache-2.0
"""A linear layer on a frozen weight: forward and the gradient of the input, never the gradient of the weight.

    y = x W^T            [s, b, in] -> [s, b, out]
    dL/dx = dL/dy W      summed over the tensor-parallel group where the input is replicated (Megatron's "f")

Only the weight is kept for the backward pass, and it is a parameter anyway: a frozen layer stores no activation. That
is where LoRA's 4N executed FLOPs per token come from, against 6N of full fine-tuning (N: linear weights).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sum_input_gradient_over: dist.ProcessGroup | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.group = sum_input_gradient_over
        return torch.matmul(x, weight.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        grad = grads[0]
        # Two dimensions: one GEMM, also where the incoming gradient is an expanded or transposed view.
        grad_x = (grad.reshape(-1, grad.shape[-1]) @ weight).view(*grad.shape[:-1], weight.shape[1])
        if ctx.group is not None:
            dist.all_reduce(grad_x, group=ctx.group)
        return grad_x, None, None


def frozen_linear(x: Tensor, weight: Tensor, *, sum_input_gradient_over: dist.ProcessGroup | None = None) -> Tensor:
    """y = x W^T with W frozen: x [..., in], weight [out, in] -> [..., out].

    `sum_input_gradient_over`: the tensor-parallel group when `x` is replicated over it and `weight` is this rank's
    rows, so that each rank computes only a partial dL/dx.
    """
    assert not weight.requires_grad
    result: Tensor = _FrozenLinear.apply(x, weight, sum_input_gradient_over)
    return result

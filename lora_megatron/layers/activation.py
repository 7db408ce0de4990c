# SPDX-License-Identifier: Apache-2.0
"""The activation between fc1 and fc2, from fc1's output without its bias.

    y = act(x + c)                          x [..., f]                 GPT
    y = act(gate + c_gate) (up + c_up)      x = [gate | up] [..., 2 f]  gated: Llama's SwiGLU and the like

Computed in fp32 whatever the precision and rounded once. On a GPU with Triton it is one pass over x, and where FP8
codes of y are all that the next product needs, y itself is never written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lora_megatron.layers.rebuilt import passing_graph, rebuilt

try:
    from lora_megatron.layers import activation_kernels as kernels
except ImportError:  # no Triton: the same numbers, from more passes
    kernels = None  # type: ignore[assignment]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "relu": functional.relu,
}


@dataclass(frozen=True)
class Activation:
    """Which function (a key of ACTIVATIONS), and whether fc1's output is gated."""

    name: str
    gated: bool = False

    def width(self, columns: int) -> int:
        """Columns of y where x has `columns`."""
        return columns // 2 if self.gated else columns

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [..., f] from x [..., f or 2 f] and fc1's bias; x alone is kept for the backward pass."""
        return rebuilt(self, x, bias)

    def value(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        (bias,) = parameters
        if kernels is not None and x.is_cuda and not torch.is_grad_enabled():
            return kernels.activate(x.contiguous(), bias, self.name, gated=self.gated)
        return self.exactly(x, bias).to(x.dtype)

    def input_gradient(self, x: Tensor, grad: Tensor, *parameters: Tensor | None) -> Tensor | None:
        (bias,) = parameters
        if kernels is not None and x.is_cuda:
            return kernels.activate_gradient(x.contiguous(), bias, grad.contiguous(), self.name, gated=self.gated)
        return None

    def gradient(self, x: Tensor, bias: Tensor | None, grad: Tensor) -> Tensor:
        """dL/dx from dL/dy, where the bias does not train."""
        found = self.input_gradient(x, grad, bias)
        return self.exact_gradient(x, bias, grad).to(x.dtype) if found is None else found

    def exactly(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """y before it is rounded, in fp32 (or better); the reference that kernels are held to."""
        values = x if x.dtype == torch.float64 else x.float()
        if bias is not None:
            values = values + bias.to(values.dtype)
        if not self.gated:
            return ACTIVATIONS[self.name](values)
        gate, up = values.chunk(2, -1)
        return ACTIVATIONS[self.name](gate) * up

    def exact_gradient(self, x: Tensor, bias: Tensor | None, grad: Tensor) -> Tensor:
        """dL/dx in fp32 (or better) from dL/dy."""
        with passing_graph():
            leaf = (x.detach() if x.dtype == torch.float64 else x.detach().float()).requires_grad_()
            y = self.exactly(leaf, bias)
        return torch.autograd.grad(y, leaf, grad.to(y.dtype))[0]

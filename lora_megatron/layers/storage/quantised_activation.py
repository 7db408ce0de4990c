# SPDX-License-Identifier: Apache-2.0
"""The activation, and the gradient of its input, straight to FP8 (`layers.activation`, `storage.fp8`)."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from lora_megatron.layers.activation import Activation
from lora_megatron.layers.storage.fp8 import Quantised, agree_over, quantise_tokens

try:
    from lora_megatron.layers import activation_kernels as kernels
except ImportError:  # no Triton: the same numbers, from more passes
    kernels = None  # type: ignore[assignment]


def activated(
    activation: Activation, x: Tensor, bias: Tensor | None, *, factor: Tensor | None, group: dist.ProcessGroup | None
) -> Quantised:
    """q(act(x + bias) diag(factor)): x [m, f or 2 f] -> [m, f]; `factor` and `group` as in `quantise_tokens`."""
    if kernels is not None and x.is_cuda:
        name, gated = activation.name, activation.gated
        return Quantised(*kernels.activate_in_fp8(x, bias, factor, name, gated=gated, agree=agree_over(group)))
    return quantise_tokens(activation.exactly(x, bias), factor=factor, group=group)


def activation_gradient(
    activation: Activation,
    x: Tensor,
    bias: Tensor | None,
    grad: Tensor,
    *,
    factor: Tensor | None,
    group: dist.ProcessGroup | None,
) -> Quantised:
    """q(dL/dx diag(factor)) from grad = dL/dy [m, f]: [m, f or 2 f]."""
    if kernels is not None and x.is_cuda:
        name, gated, agree = activation.name, activation.gated, agree_over(group)
        codes = kernels.activate_gradient_in_fp8(x, bias, grad, factor, name, gated=gated, agree=agree)
        return Quantised(*codes)
    return quantise_tokens(activation.exact_gradient(x, bias, grad), factor=factor, group=group)

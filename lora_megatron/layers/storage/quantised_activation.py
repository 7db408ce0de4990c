# SPDX-License-Identifier: Apache-2.0
"""The activation, and the gradient of its input, straight to FP8 (`layers.activation`, `storage.fp8`)."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from lora_megatron.layers.activation import Activation
from lora_megatron.layers.storage.fp8 import agree_over, quantise_tokens
from lora_megatron.layers.storage.left_codes import Quantised

try:
    from lora_megatron.layers import activation_kernels as kernels
except ImportError:  # no Triton: the same numbers, from more passes
    kernels = None  # type: ignore[assignment]


class Activated(NamedTuple):
    """What a product reads, and what an adapter does: y [m, f] in the type of x, where asked for."""

    quantised: Quantised
    y: Tensor | None


class ActivationGradient(NamedTuple):
    """The same of dL/dx [m, f or 2 f]; and y again."""

    quantised: Quantised
    dx: Tensor | None
    y: Tensor | None


def activated(
    activation: Activation,
    x: Tensor,
    bias: Tensor | None,
    *,
    factor: Tensor | None,
    group: dist.ProcessGroup | None,
    keep: bool = False,
) -> Activated:
    """q(y diag(factor)) of y = act(x + bias), and y itself with `keep`: x [m, f or 2 f]; `factor` and `group` as in
    `quantise_tokens`."""
    name, gated = activation.name, activation.gated
    if kernels is not None and x.is_cuda:
        codes, scale, kept = kernels.activate_in_fp8(
            x, bias, factor, name, gated=gated, agree=agree_over(group), keep=keep
        )
        return Activated(Quantised(codes, scale), kept)
    y = activation.exactly(x, bias)
    return Activated(quantise_tokens(y, factor=factor, group=group), y.to(x.dtype) if keep else None)


def activation_gradient(
    activation: Activation,
    x: Tensor,
    bias: Tensor | None,
    grad: Tensor,
    *,
    factor: Tensor | None,
    group: dist.ProcessGroup | None,
    keep: bool = False,
    keep_y: bool = False,
) -> ActivationGradient:
    """q(dL/dx diag(factor)) from grad = dL/dy [m, f]; with `keep` dL/dx itself, with `keep_y` y."""
    name, gated = activation.name, activation.gated
    if kernels is not None and x.is_cuda:
        codes, scale, *kept = kernels.activate_gradient_in_fp8(
            x, bias, grad, factor, name, gated=gated, agree=agree_over(group), keep=keep, keep_y=keep_y
        )
        return ActivationGradient(Quantised(codes, scale), *kept)
    dx = activation.exact_gradient(x, bias, grad)
    return ActivationGradient(
        quantise_tokens(dx, factor=factor, group=group),
        dx.to(x.dtype) if keep else None,
        activation.exactly(x, bias).to(x.dtype) if keep_y else None,
    )

# SPDX-License-Identifier: Apache-2.0
"""The activation, and the gradient of its input, straight to FP8 (`layers.activation`, `storage.fp8`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lora_megatron.layers.activation import Activation
from lora_megatron.layers.storage.fp8 import agree_over, quantise_tokens
from lora_megatron.layers.storage.left_codes import Quantised

try:
    from lora_megatron.layers import activation_kernels as kernels
    from lora_megatron.layers import held_activation_kernels as held
    from lora_megatron.layers.storage.held_rows import can_hold
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
    """q(y diag(factor)) of y = act(x + bias), rounded to the type of x when multiplied, and y itself with `keep`: x
    [m, f or 2 f]; `factor` and `group` as in `quantise_tokens`."""
    name, gated = activation.name, activation.gated
    if kernels is not None and x.is_cuda:
        agree = agree_over(group)
        if agree is None and not keep and can_hold(x, activation.width(x.shape[1])):
            return Activated(Quantised(*held.activate(x, bias, factor, name, gated=gated)), None)
        codes, scale, kept = kernels.activate_in_fp8(x, bias, factor, name, gated=gated, agree=agree, keep=keep)
        return Activated(Quantised(codes, scale), kept)
    y = activation.exactly(x, bias)
    return Activated(_quantised(y, factor, x.dtype, group), y.to(x.dtype) if keep else None)


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
        agree = agree_over(group)
        if agree is None and not (keep or keep_y) and can_hold(x, x.shape[1]):
            quantised = Quantised(*held.activate_gradient(x, bias, grad, factor, name, gated=gated))
            return ActivationGradient(quantised, None, None)
        codes, scale, *kept = kernels.activate_gradient_in_fp8(
            x, bias, grad, factor, name, gated=gated, agree=agree, keep=keep, keep_y=keep_y
        )
        return ActivationGradient(Quantised(codes, scale), *kept)
    dx = activation.exact_gradient(x, bias, grad)
    return ActivationGradient(
        _quantised(dx, factor, x.dtype, group),
        dx.to(x.dtype) if keep else None,
        activation.exactly(x, bias).to(x.dtype) if keep_y else None,
    )


def _quantised(values: Tensor, factor: Tensor | None, dtype: torch.dtype, group: dist.ProcessGroup | None) -> Quantised:
    """q of values diag(factor) rounded to `dtype`: values [m, k] in fp32."""
    return quantise_tokens((values if factor is None else values * factor).to(dtype), factor=None, group=group)

# SPDX-License-Identifier: Apache-2.0
"""Gradients of factors, added in the backward pass to where megatron-core's DDP sums them.

    main_grad [fp32] += dA or dB                  once a microbatch, by the function that computes it

Handed to autograd instead, each would be rounded to the factor's type and added by DDP's hook, in a launch of its own:
a layer has a dozen factors, and so small a kernel costs more to start than to run. A factor for which nobody keeps a
`main_grad` (layers without DDP), or on which somebody has put a hook, has its gradient handed to autograd, as any
parameter has.

DDP's hook runs all the same. It adds `.grad` unless `grad_added_to_main_grad` is set, which `zero_grad_buffer` takes
back before each step. A `.grad` must be there if reductions overlap the backward pass, and it keeps the hook on the
thread of the backward pass: autograd is handed memory that nobody has written, as megatron-core's own fused gradients
hand it. Both are matters of the host, so a CUDA graph repeats the additions and knows nothing of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from lora_megatron.layers.aside import FOR_THE_END

try:
    from lora_megatron.layers import main_grad_kernels as kernels
except ImportError:  # no Triton: an addition for each factor
    kernels = None  # type: ignore[assignment]  # mypy takes the name for a module; None is what is asked for below

_VERSION = TorchVersion(torch.__version__)
_FP32_PRODUCTS, _FP32_SUMS = _VERSION >= "2.8", _VERSION >= "2.11"
"""Whether torch, on CUDA, multiplies bf16 matrices into an fp32 one; and whether it adds the product to one."""


def main_grads_of(factors: Sequence[Tensor]) -> list[Tensor] | None:
    """The fp32 tensors of the factors' shapes in which DDP sums their gradients; None unless each of them has one."""
    found = [main for factor in factors if (main := _main_grad_of(factor)) is not None]
    if len(found) == len(factors):
        return found
    # A hook came in the middle of a step: DDP would take a gradient handed on now for one that is added already.
    assert not any(getattr(factor, "grad_added_to_main_grad", False) for factor in factors)
    return None


def _main_grad_of(factor: Tensor) -> Tensor | None:
    main: Tensor | None = getattr(factor, "main_grad", None)
    if main is None or not hasattr(factor, "grad_added_to_main_grad") or factor._backward_hooks:
        return None  # a hook is to see the gradient, or to change it
    if getattr(factor, "zero_out_wgrad", False):
        return None  # DDP adds `.grad` whatever it is told
    return main if factor.requires_grad and main.dtype == torch.float32 and main.is_contiguous() else None


def already_added(factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What autograd is handed for factors whose gradients are in their `main_grad`, which DDP is told here."""
    for factor in factors:
        factor.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # DDP's own mark on a parameter
    return tuple(_unwritten(factor) for factor in factors)


def _unwritten(factor: Tensor) -> Tensor:
    """A new one each time: autograd keeps what nobody else holds, and copies anything else."""
    return torch.empty_like(factor)


def gradients_of_rows(factors: Sequence[Tensor], left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
    """What autograd is handed for factors [r, n] whose gradients are, one below the other, left @ right [sum of r, n].

    left [sum of r, m], right [m, n], both in the factors' type.
    """
    rows = [factor.shape[0] for factor in factors]
    mains = main_grads_of(factors)
    if mains is None:
        return tuple((left @ right).split(rows))
    FOR_THE_END.do(partial(_add_product, mains, left, right))
    return already_added(factors)


def _add_product(mains: Sequence[Tensor], left: Tensor, right: Tensor) -> None:
    """left @ right, of which each of `mains` has some rows, is added to them."""
    if len(mains) == 1 and _FP32_SUMS and _is_narrow(left) and left.is_cuda:
        torch.addmm(mains[0], left, right, out_dtype=torch.float32, out=mains[0])
        return
    product = _fp32_product(left, right)
    if kernels is not None and product.is_cuda and product.dtype == torch.float32 and 1 < len(mains) <= kernels.MOST:
        kernels.add_rows(mains, product)
    else:
        for main, own in zip(mains, product.split([main.shape[0] for main in mains]), strict=True):
            main.add_(own)


def _fp32_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, not rounded to their type where that is a narrow one (but by an older torch on CUDA)."""
    if not _is_narrow(left):
        return left @ right
    if not left.is_cuda:
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32) if _FP32_PRODUCTS else left @ right


def _is_narrow(values: Tensor) -> bool:
    return values.dtype in (torch.bfloat16, torch.float16)

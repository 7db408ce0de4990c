# SPDX-License-Identifier: Apache-2.0
"""Frozen weights in FP8 (e4m3), and products of FP8 matrices.

    W [out, in] ~ diag(s) Q      axis 0: one scale per row, s = max |row| / 448
    W [out, in] ~ Q diag(s)      axis 1: one scale per column

Activations and gradients are quantised on the fly, one scale per token. A scale of W that lies on the inner dimension
of a product is multiplied into the other factor before that is quantised, so both products need one scale per row and
one per column of the result only, which is what the hardware's GEMM applies for nothing:

              axis 0                          axis 1
    x W^T     q(x) Q^T  diag(s) after         q(x diag(s)) Q^T
    g W       q(g diag(s)) Q                  q(g) Q  diag(s) after

A token's scale is the largest value over the whole inner dimension. Where that dimension is cut over the tensor ranks
the largest is taken over all of them (one number per token), so that a result does not depend on the cut.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

try:
    from lora_megatron.layers.storage import kernels
except ImportError:  # no Triton: the same numbers, from more and slower passes
    kernels = None  # type: ignore[assignment]
from lora_megatron.layers.storage.stored import Stored

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3


def scale_of(largest: Tensor) -> Tensor:
    """Scale that maps `largest` (>= 0) onto the largest FP8 number; 1 for a vector of zeros."""
    return torch.where(largest > 0, largest.float() / LARGEST, 1.0)


def to_fp8(values: Tensor, scale: Tensor) -> Tensor:
    """Round values / scale to FP8; magnitudes past the largest number, which rounding of the scale allows, clip."""
    return (values.float() / scale).clamp(-LARGEST, LARGEST).to(FP8)


def quantise_tokens(x: Tensor, *, factor: Tensor | None, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """q(x diag(factor)) and the scale of every token: [m, k] -> [m, k] FP8, [m, 1] fp32.

    `group`: the ranks over which the k inner values of a token are spread.
    """

    def agree(largest: Tensor) -> None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)

    if kernels is not None and x.is_cuda:
        return kernels.quantise_rows(x.contiguous(), factor, agree=None if group is None else agree)
    values = x.float() if factor is None else x.float() * factor
    largest = values.abs().amax(1, keepdim=True)
    if group is not None:
        agree(largest)
    scale = scale_of(largest)
    return to_fp8(values, scale), scale


def transposed_fp8(codes: Tensor) -> Tensor:
    """[n, k] FP8 -> [k, n] FP8, contiguous."""
    if kernels is not None and codes.is_cuda:
        return kernels.transpose(codes)
    return codes.view(torch.uint8).t().contiguous().view(FP8)


@functools.lru_cache
def _ones(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, device=device)


def multiply(
    a: Tensor,
    scale_a: Tensor,
    b: Tensor,
    scale_b: Tensor | None,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    fast: bool = False,
) -> Tensor:
    """diag(scale_a) a b^T diag(scale_b) + bias: a [m, k], b [n, k] FP8, scales fp32 [m, 1] and [n], bias [n] -> [m, n].

    `fast` adds up in the tensor core's own, shorter registers: good to 14 bits or so, far finer than FP8 itself. It is
    for the forward product; gradients are added up in fp32.

    Where the GEMM cannot be done in FP8 (a CPU, sizes that are no multiples of 16) the same numbers are multiplied in
    fp32.
    """
    if a.is_cuda and dtype == torch.bfloat16 and a.shape[1] % 16 == 0 and b.shape[0] % 16 == 0:
        columns = _ones(b.shape[0], b.device) if scale_b is None else scale_b
        return torch._scaled_mm(
            a,
            b.t(),
            scale_a=scale_a,
            scale_b=columns.view(1, -1),
            bias=bias,
            out_dtype=dtype,
            use_fast_accum=fast,
        )
    product = a.float() @ b.float().t()
    product *= scale_a
    if scale_b is not None:
        product *= scale_b
    if bias is not None:
        product += bias.float()
    return product.to(dtype)


def fp8_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, *, axis: int, group: dist.ProcessGroup | None
) -> Tensor:
    """x W^T + bias with W [n, k] = codes and `scale` along `axis`: [m, k] -> [m, n]."""
    if axis == 0:
        quantised, tokens = quantise_tokens(x, factor=None, group=None)
        return multiply(quantised, tokens, codes, scale, x.dtype, bias=bias, fast=True)
    quantised, tokens = quantise_tokens(x, factor=scale, group=group)
    return multiply(quantised, tokens, codes, None, x.dtype, bias=bias, fast=True)


def fp8_input_gradient(
    grad: Tensor, codes: Tensor, scale: Tensor, *, axis: int, group: dist.ProcessGroup | None
) -> Tensor:
    """grad W with W^T [k, n] = codes: [m, n] -> [m, k]."""
    if axis == 0:
        quantised, tokens = quantise_tokens(grad, factor=scale, group=group)
        return multiply(quantised, tokens, codes, None, grad.dtype)
    quantised, tokens = quantise_tokens(grad, factor=None, group=None)
    return multiply(quantised, tokens, codes, scale, grad.dtype)


class StoredFp8(Stored):
    """A byte per weight and an fp32 scale per row (axis 0) or column (axis 1)."""

    codes: Tensor
    scale: Tensor

    def __init__(self, out_features: int, in_features: int, *, device: torch.device, **cut: Any) -> None:
        super().__init__(out_features, in_features, **cut)
        self.register_buffer("codes", torch.zeros(self.shape, dtype=torch.float32, device=device).to(FP8), False)
        self.register_buffer("scale", torch.ones(self.shape[self.axis], device=device), False)

    def store(self, weight: Tensor) -> None:
        inner = 1 - self.axis
        scale = scale_of(weight.float().abs().amax(inner, keepdim=True))
        self.codes.copy_(to_fp8(weight, scale))
        self.scale.copy_(scale.flatten())

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        scale = self.scale[:, None] if self.axis == 0 else self.scale
        return (self.codes.float() * scale).to(dtype)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return fp8_linear(x, self.codes, self.scale, bias, axis=self.axis, group=self.group)

    def input_gradient(self, grad: Tensor) -> Tensor:
        return fp8_input_gradient(grad, transposed_fp8(self.codes), self.scale, axis=self.axis, group=self.group)

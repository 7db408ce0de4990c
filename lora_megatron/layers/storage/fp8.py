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
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

try:
    from lora_megatron.layers.storage import kernels
except ImportError:  # no Triton: the same numbers, from more and slower passes
    kernels = None  # type: ignore[assignment]
from lora_megatron.layers.aside import start_all
from lora_megatron.layers.storage.host_transposes import HostTransposes
from lora_megatron.layers.storage.left_codes import Quantised, take
from lora_megatron.layers.storage.product import Product
from lora_megatron.layers.storage.stored import Stored

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
SMALLEST = 1e-30
"""Of a vector's magnitudes: below, all of it is rounded to zero, since the inverse of its scale would be infinite."""


def scale_of(largest: Tensor) -> Tensor:
    """Scale that maps `largest` (>= 0) onto the largest FP8 number; 1 for a vector of (almost) zeros."""
    return torch.where(largest > SMALLEST, largest.float() / LARGEST, 1.0)


def to_fp8(values: Tensor, scale: Tensor) -> Tensor:
    """Round values (1 / scale) to FP8; magnitudes past the largest number, which rounding of the scale allows, clip."""
    return (values.float() * scale.reciprocal()).clamp(-LARGEST, LARGEST).to(FP8)


def quantise_tokens(x: Tensor, *, factor: Tensor | None, group: dist.ProcessGroup | None) -> Quantised:
    """q(x diag(factor)) of x [m, k], the product rounded to the type of x: so the kernels of activations hold theirs.

    `group`: the ranks over which the k inner values of a token are spread.
    Not quantised again where whoever made x left it (`left_codes`)."""
    if factor is None and group is None:
        left = take(x)
        if left is not None:
            return left
    if kernels is not None and x.is_cuda:
        return Quantised(*kernels.quantise_rows(x.contiguous(), factor, agree=agree_over(group)))
    values = x.float() if factor is None else (x.float() * factor).to(x.dtype).float()
    largest = values.abs().amax(1, keepdim=True)
    agree = agree_over(group)
    if agree is not None:
        agree(largest)
    scale = scale_of(largest)
    return Quantised(to_fp8(values, scale), scale)


def agree_over(group: dist.ProcessGroup | None) -> Callable[[Tensor], None] | None:
    """What raises tokens' largest magnitudes to those of all ranks of `group`, in place; None without a group."""
    if group is None:
        return None

    def agree(largest: Tensor) -> None:
        start_all()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)

    return agree


def transposed_fp8(codes: Tensor) -> Tensor:
    """[n, k] FP8 -> [k, n] FP8, contiguous."""
    if kernels is not None and codes.is_cuda:
        return kernels.transpose(codes)
    return codes.view(torch.uint8).t().contiguous().view(FP8)


@functools.cache  # without a limit, as a CUDA graph reads them for as long as it lives: one for each width there is
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
    out: Tensor | None = None,
) -> Tensor:
    """diag(scale_a) a b^T diag(scale_b) + bias: a [m, k], b [n, k] FP8, scales fp32 [m, 1] and [n], bias [n] -> [m, n],
    written over `out` where that is given.

    `fast` adds up in the tensor core's own, shorter registers: a product of 49152 addends is off by 6e-3, where
    rounding both factors to FP8 costs 4e-2. It is for the forward product; gradients are added up in fp32, unless
    `base.fast_accum` says otherwise.

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
            out=out,
        )
    product = a.float() @ b.float().t()
    product *= scale_a
    if scale_b is not None:
        product *= scale_b
    if bias is not None:
        product += bias.float()
    return product.to(dtype) if out is None else out.copy_(product)


class Fp8Products(Stored):
    """A stored weight whose products are done in FP8.

    What quantises a factor and what multiplies are apart, so that a kernel which computes the factor can quantise it.
    """

    fast_forward = True
    fast_backward = False
    """Which of both products adds up in shorter registers (`multiply`)."""
    transposes = 1
    """How many backward products in a row read what was transposed for the first of them; 0: all there ever are."""
    host: HostTransposes | None = None
    """Where what was transposed is kept instead."""
    told: HostTransposes | None = None
    """Who is told of forward products: that of the rank's other weights."""
    _transposed: Tensor | None = None
    _uses = 0

    @abstractmethod
    def fp8_codes(self, *, transposed: bool) -> Tensor:
        """W as FP8 codes, [out, in] or [in, out] transposed."""

    @abstractmethod
    def column_scale(self) -> Tensor:
        """Its scale along `axis`, fp32 [out] for axis 0, [in] for axis 1."""

    def forget_transposed(self) -> None:
        """To be called when W changes."""
        self._transposed, self._uses = None, 0
        if self.host is not None:
            self.host.forget(self)

    def transposed_codes(self) -> Tensor:
        """[in, out], for one backward product; kept if others are to read it."""
        if self.host is not None:
            return self.host.codes_of(self, functools.partial(self.fp8_codes, transposed=True))
        codes = self.fp8_codes(transposed=True) if self._transposed is None else self._transposed
        self._uses += 1
        if self._uses == self.transposes:
            self.forget_transposed()
        else:
            self._transposed = codes
        return codes

    def forward_factor(self) -> Tensor | None:
        """What x is multiplied with before it is quantised, [in]."""
        return self.column_scale() if self.axis == 1 else None

    def backward_factor(self) -> Tensor | None:
        """What dL/dy is multiplied with before it is quantised, [out]."""
        return self.column_scale() if self.axis == 0 else None

    @property
    def forward_group(self) -> dist.ProcessGroup | None:
        """The ranks over which a token of x is spread."""
        return self.group if self.axis == 1 else None

    @property
    def backward_group(self) -> dist.ProcessGroup | None:
        """The ranks over which a token of dL/dy is spread."""
        return self.group if self.axis == 0 else None

    def forward_product(self, dtype: torch.dtype, bias: Tensor | None = None) -> Product:
        if self.told is not None:
            self.told.forward_runs()
        codes, scale = self.fp8_codes(transposed=False), self.column_scale()
        after, factor, group = scale if self.axis == 0 else None, self.forward_factor(), self.forward_group
        return self._product(codes, after, dtype, factor, group, bias, fast=self.fast_forward)

    def backward_product(self, dtype: torch.dtype) -> Product:
        codes, scale = self.transposed_codes(), self.column_scale()
        after, factor, group = scale if self.axis == 1 else None, self.backward_factor(), self.backward_group
        return self._product(codes, after, dtype, factor, group, None, fast=self.fast_backward)

    @staticmethod
    def _product(
        codes: Tensor,
        after: Tensor | None,
        dtype: torch.dtype,
        factor: Tensor | None,
        group: dist.ProcessGroup | None,
        bias: Tensor | None,
        *,
        fast: bool,
    ) -> Product:
        def into(out: Tensor, rows: Tensor, scale: Tensor) -> None:
            multiply(rows, scale, codes, after, dtype, bias=bias, fast=fast, out=out)

        return Product(codes.shape[0], dtype, lambda x: quantise_tokens(x, factor=factor, group=group), into)


class StoredFp8(Fp8Products):
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
        self.forget_transposed()
        self.scale.copy_(scale.flatten())

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        scale = self.scale[:, None] if self.axis == 0 else self.scale
        return self.codes.float().mul_(scale).to(dtype)

    def rows(self, index: Tensor) -> Tensor:
        """Rows of W, fp32: index [n] -> [n, in]; for axis 0."""
        codes = self.codes.view(torch.uint8)[index].view(FP8)  # torch does not index FP8 everywhere
        return codes.float().mul_(self.scale[index].unsqueeze(1))

    def column_scale(self) -> Tensor:
        return self.scale

    def fp8_codes(self, *, transposed: bool) -> Tensor:
        return transposed_fp8(self.codes) if transposed else self.codes

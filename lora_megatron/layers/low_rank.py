# SPDX-License-Identifier: Apache-2.0
"""The low-rank update of a fused output: fused[part] + scale u B^T, for every adapted projection.

forward     fused[:, part] += s u B^T                     u = x A^T: [m, r], B: [rows of part, r]
backward    du = s g[:, part] B,   dB = s g[:, part]^T u,   the gradient of `fused` is g itself
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_megatron.layers.qkv import Part

try:
    from lora_megatron.layers import low_rank_kernels as kernels
except ImportError:  # no Triton: the same, through general products
    kernels = None  # type: ignore[assignment]


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, fused: Tensor, parts: Sequence[Part], scales: Sequence[float], u: Tensor, *bs: Tensor
    ) -> Tensor:
        ctx.parts, ctx.scales = parts, scales
        ctx.save_for_backward(u, *bs)
        ctx.mark_dirty(fused)
        flat = fused.view(-1, fused.shape[-1])
        for part, scale, piece, b in zip(parts, scales, _pieces(u, bs), bs, strict=True):
            if kernels is not None and flat.is_cuda:
                kernels.add_product(flat, piece, b, part, scale)
            else:
                part.of(flat).add_(((piece * scale) @ b.t()).unflatten(-1, (part.groups, -1)))
        return fused

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        u, *bs = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        dus, dbs = [], []
        for part, scale, piece, b in zip(ctx.parts, ctx.scales, _pieces(u, bs), bs, strict=True):
            if kernels is not None and flat.is_cuda:
                du, db = kernels.product_gradients(flat, piece, b, part, scale)
            else:
                values = part.of(flat).flatten(-2) * scale
                du, db = values @ b, values.t() @ piece
            dus.append(du)
            dbs.append(db)
        return grad, None, None, torch.cat(dus, -1).view(u.shape), *dbs


def _pieces(u: Tensor, bs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Each adapter's columns of u: [m, r]."""
    pieces: tuple[Tensor, ...] = u.view(-1, u.shape[-1]).split([b.shape[1] for b in bs], -1)
    return pieces


def add_low_rank(
    fused: Tensor, parts: Sequence[Part], scales: Sequence[float], u: Tensor, bs: Sequence[Tensor]
) -> Tensor:
    """fused [..., groups * stride] with each part's update added: u [..., sum of r], b [part.rows, r].

    Written over `fused`, which nothing else may read or keep for its backward pass.
    """
    # Autograd forbids in-place changes of what a function, such as a sum over ranks, hands on as it is: that is a view,
    # and others may hold what it is a view of. Nobody does here, which this says, as torch's own matmul does.
    alone = torch.ops.aten._unsafe_view(fused, fused.shape)
    result: Tensor = _AddLowRank.apply(alone, tuple(parts), tuple(scales), u, *bs)
    return result

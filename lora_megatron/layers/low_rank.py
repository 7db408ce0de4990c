# SPDX-License-Identifier: Apache-2.0
"""The low-rank update of a fused output: fused[part] + scale u B^T, for every adapted projection.

forward     fused[:, part] += s u B^T                     u = x A^T: [m, r], B: [rows of part, r]
backward    du = s g[:, part] B,   dB = s g[:, part]^T u,   the gradient of `fused` is g itself

What follows a row layer goes with it: its bias c and the residual are added in the same pass, h = fused + s u B^T + c +
residual; the gradient of `residual` is g too, and that of c is g summed over tokens.

Under DDP, dB is added to the factor's fp32 sum here and now (`main_grad`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_megatron.layers.main_grad import already_added, gradients_of_rows, main_grads_of
from lora_megatron.layers.qkv import Part

try:
    from lora_megatron.layers import low_rank_kernels as kernels
    from lora_megatron.layers import residual_kernels
except ImportError:  # no Triton: the same, through general products
    kernels = None  # type: ignore[assignment]  # mypy takes the name for a module; None is what is asked for below


@dataclass(frozen=True)
class Update:
    """What is added to a layer's output: u [..., sum of r], and a part, a scale and b [part.rows, r] per adapter."""

    parts: tuple[Part, ...]
    scales: tuple[float, ...]
    u: Tensor
    bs: tuple[Tensor, ...]
    aside: bool = False
    """Whether du is for an exchange's copies (`layers.aside`)."""
    added: slice | None = None
    """Rows of the output that have their update already."""

    @property
    def rows(self) -> int:
        """m."""
        return self.u.numel() // self.u.shape[-1]

    def add_to(self, flat: Tensor) -> None:
        """Write flat [m, groups * stride] over with itself and the update, in what has not got it; no gradient."""
        if self.added is not None:
            for rows in (slice(0, self.added.start), slice(self.added.stop, self.rows)):
                if rows.start < rows.stop:
                    replace(self, u=self._flat_u()[rows], added=None).add_to(flat[rows])
        elif self.by_kernel(flat):
            kernels.add_products(flat, self._flat_u(), self.bs, self.parts, self.scales)
        else:
            for part, scale, piece, b in self._each():
                part.of(flat).add_(((piece * scale) @ b.t()).unflatten(-1, (part.groups, -1)))

    def add_to_residual(self, flat: Tensor, residual: Tensor, bias: Tensor | None) -> None:
        """Likewise with residual [m, n] and bias [n] besides, where the update is of all of flat [m, n]."""
        assert self.added is None, "the residual goes to all rows"
        if self.by_kernel(flat):
            (b,), (scale,) = self.bs, self.scales
            residual_kernels.add_product_and_residual(flat, residual.contiguous(), bias, self._flat_u(), b, scale)
            return
        self.add_to(flat)
        if bias is not None:
            flat.add_(bias)
        flat.add_(residual)

    def gradients(self, flat: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(du, what autograd is handed for each B) from the output's gradient [m, groups * stride].

        Called once for a gradient: where a B has a `main_grad`, dB is added to it.
        """
        mains = main_grads_of(self.bs)
        if self.by_kernel(flat):
            problem = (flat.contiguous(), self._flat_u(), self.bs, self.parts, self.scales)
            du, found = kernels.product_gradients(*problem, mains, aside=self.aside)
            return du.view(self.u.shape), found if mains is None else already_added(self.bs)
        dus, dbs = list[Tensor](), list[Tensor]()
        for part, scale, piece, b in self._each():
            values = part.of(flat).flatten(-2) * scale
            dus.append(values @ b)
            dbs.extend(gradients_of_rows((b,), values.t(), piece))
        return (dus[0] if len(dus) == 1 else torch.cat(dus, -1)).view(self.u.shape), tuple(dbs)

    def gradients_of_parts(
        self, grads: Sequence[Tensor], all_parts: tuple[Part, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """(the output's gradient [m, groups * stride], and `gradients` of it) from a gradient [m, part.rows] of each of
        `all_parts`, which the output consists of."""
        if not self.by_kernel(grads[0]):
            runs = [grad.unflatten(-1, (part.groups, -1)) for grad, part in zip(grads, all_parts, strict=True)]
            flat = torch.cat(runs, -1).flatten(-2)
            return flat, *self.gradients(flat)
        mains = main_grads_of(self.bs)
        own = {part.name: index for index, part in enumerate(self.parts)}

        def each(values: Sequence[Any], otherwise: Any) -> list[Any]:
            return [values[own[part.name]] if part.name in own else otherwise for part in all_parts]

        flat, du, found = kernels.split_gradients(
            [_aligned(grad.contiguous()) for grad in grads], self._flat_u(), each(self.bs, None), all_parts,
            each(self.scales, 1.0), None if mains is None else each(mains, None), aside=self.aside,
        )  # fmt: skip
        return flat, du.view(self.u.shape), found if mains is None else already_added(self.bs)

    def by_kernel(self, flat: Tensor) -> bool:
        """Whether in one pass. Not for very large ranks, which are no update beside a product, nor without tokens."""
        if kernels is None or not flat.is_cuda or flat.dtype == torch.float64 or not flat.numel():
            return False
        return kernels.can_take(self.bs)

    def _flat_u(self) -> Tensor:
        return self.u.reshape(-1, self.u.shape[-1]).contiguous()

    def _each(self) -> Iterator[tuple[Part, float, Tensor, Tensor]]:
        """With each adapter's columns of u: [m, r]."""
        pieces = self.u.view(-1, self.u.shape[-1]).split([b.shape[1] for b in self.bs], -1)
        return zip(self.parts, self.scales, pieces, self.bs, strict=True)


def _aligned(grad: Tensor) -> Tensor:
    """A copy where it begins at a place from which a kernel cannot read 16 bytes at a time."""
    return grad if grad.data_ptr() % 16 == 0 else grad.clone()


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        fused: Tensor,
        residual: Tensor | None,
        bias: Tensor | None,
        parts: tuple[Part, ...],
        scales: tuple[float, ...],
        aside: bool,
        u: Tensor,
        *bs: Tensor,
    ) -> Tensor:
        ctx.parts, ctx.scales, ctx.aside = parts, scales, aside
        ctx.bs = bs  # the parameters themselves, for their `main_grad`
        ctx.save_for_backward(u, *bs)  # b for autograd to notice if it changes before the backward pass
        ctx.mark_dirty(fused)
        update, flat = Update(parts, scales, u, bs), fused.view(-1, fused.shape[-1])
        if residual is None:
            update.add_to(flat)
        else:
            update.add_to_residual(flat, residual.reshape(flat.shape), bias)
        return fused

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        u = ctx.saved_tensors[0]
        flat = grad.reshape(-1, grad.shape[-1])
        of_residual, of_bias = (grad if ctx.needs_input_grad[1] else None), None
        if ctx.needs_input_grad[2]:
            of_bias = flat.sum(0)
        du, dbs = Update(ctx.parts, ctx.scales, u, ctx.bs, ctx.aside).gradients(flat)
        return grad, of_residual, of_bias, None, None, None, du, *dbs


def add_low_rank(
    fused: Tensor, update: Update, *, residual: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """fused [..., groups * stride] with the update added; with `residual`, of the same shape and type, that and bias
    [groups * stride] as well.

    Written over `fused`, which nothing else may read or keep for its backward pass.
    """
    assert bias is None or residual is not None, "a bias by itself is the product's"
    assert residual is not fused, "it would be written over"
    assert update.added is None, "some rows would get it twice"
    # Autograd forbids in-place changes of what a function, such as a sum over ranks, hands on as it is: that is a view,
    # and others may hold what it is a view of. Nobody does here, which this says, as torch's own matmul does.
    alone = torch.ops.aten._unsafe_view(fused, fused.shape)
    how = update.parts, update.scales, update.aside
    result: Tensor = _AddLowRank.apply(alone, residual, bias, *how, update.u, *update.bs)
    return result

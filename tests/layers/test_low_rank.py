# SPDX-License-Identifier: Apache-2.0
"""The low-rank update of a fused output has the values and gradients of plain algebra, written out in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_megatron.layers.low_rank import Update, add_low_rank
from lora_megatron.layers.qkv import qkv_parts


class HandedOn(torch.autograd.Function):
    """What a sum over one rank is: its input as it is, and a gradient of its own (here doubled, to tell)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


@pytest.mark.parametrize("through", ["a product", "a function that hands it on"])
def test_update_and_gradients_are_those_of_plain_algebra(through: str) -> None:
    parts = qkv_parts(4, 2, 3)
    q, _, v = parts
    generator = torch.Generator().manual_seed(0)
    base, weight = (torch.randn(2, 5, 24, generator=generator, dtype=torch.float64) for _ in range(2))
    u = torch.randn(2, 5, 4 + 1, generator=generator, dtype=torch.float64)
    bs = [torch.randn(part.rows, r, generator=generator, dtype=torch.float64) for part, r in ((q, 4), (v, 1))]
    leaves = [tensor.requires_grad_() for tensor in (base, u, *bs)]
    handed_on = through != "a product"
    fused = HandedOn.apply(base * 1) if handed_on else base * 1
    place = fused.data_ptr()
    got = add_low_rank(fused, Update((q, v), (0.5, 3.0), u, tuple(bs)))
    assert got.data_ptr() == place, "written over what it is added to"

    rows = {part.name: part.rows_of(torch.arange(24)).flatten() for part in parts}
    want = base.index_add(-1, rows["q"], 0.5 * u[..., :4] @ bs[0].t())
    want = want.index_add(-1, rows["v"], 3.0 * u[..., 4:] @ bs[1].t())
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    pairs = zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (got, want)), strict=True)
    for leaf, (ours, theirs) in zip(leaves, pairs, strict=True):
        factor = 2 if handed_on and leaf is base else 1
        torch.testing.assert_close(ours, factor * theirs, rtol=1e-12, atol=1e-12)

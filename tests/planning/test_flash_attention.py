# SPDX-License-Identifier: Apache-2.0
"""What `train.attention = fa4` keeps for the backward pass against the plan: what torch's kernels keep, and the copy of
several samples' output that the projection reads. On a CPU, with a stand-in for FlashAttention 4."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from lora_megatron.layers.attention import SdpaAttention
from tests.layers.test_flash_attention import put_in_place
from tests.planning.measured import LENGTH, Case, Tree, measure_and_plan
from tests.planning.test_against_measurement import BF16, EVERY_TARGET, LLAMA, TOLERANCE, case, recompute
from tests.pool import Pool

FA4: Tree = {"train": {"attention": "fa4"}}
ONE_SAMPLE: Tree = {"data": {"micro_batch_size": 1}}


class _Flash(torch.autograd.Function):
    """Keeps what FlashAttention 4 keeps: q, k, v, the output [b, s, heads, d] and a log-sum-exp in fp32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = _attention(q, k, v).contiguous()
        batch, length, heads, _ = q.shape
        ctx.save_for_backward(q, k, v, out, q.new_zeros(batch, heads, length, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors[:3]]
        with torch.enable_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):  # what is kept here is not counted
            return torch.autograd.grad(_attention(*inputs), inputs, grads[0])


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    turned = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(*turned, is_causal=True, enable_gqa=True).transpose(1, 2)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None, causal: bool, deterministic: bool
) -> tuple[Tensor, None]:
    assert softmax_scale is None
    assert not deterministic
    assert causal
    return _Flash.apply(q, k, v), None


def measure(cases: list[Case]) -> list[tuple[Tree, Tree]]:
    """As `measure_and_plan`, where attention takes a CPU's tensors for a GPU's."""

    def is_taken(self: SdpaAttention, query: Tensor, key: Tensor) -> bool:
        return self.kernels == "fa4" and not self._hides(key.shape[0])

    with put_in_place(flash_attn_func), mock.patch.object(SdpaAttention, "_is_for_flash_attention", is_taken):
        return measure_and_plan(cases)


CASES = {
    "two samples": case(EVERY_TARGET, BF16, FA4),
    "one sample": case(EVERY_TARGET, BF16, FA4, ONE_SAMPLE),
    "two samples, nobody reads the output": case(BF16, FA4),
    "grouped": case(LLAMA, EVERY_TARGET, BF16, FA4),
    "a window": case(LLAMA, EVERY_TARGET, BF16, FA4, {"model": {"sliding_window": 16}}),
    "recomputed": case(EVERY_TARGET, BF16, FA4, recompute("selective")),
}


@pytest.fixture(scope="module")
def results(pool: Pool) -> dict[str, tuple[Tree, Tree]]:
    (found,) = pool.run(1, measure, cases=list(CASES.values()))
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_activations_are_as_planned(results: dict[str, tuple[Tree, Tree]], name: str) -> None:
    measured, planned = results[name]
    assert measured["activations"] == pytest.approx(planned["activations"] + planned["logits"], rel=TOLERANCE)


def test_only_the_copy_is_more_than_torch_keeps(pool: Pool, results: dict[str, tuple[Tree, Tree]]) -> None:
    usual = {"two samples": case(EVERY_TARGET, BF16), "one sample": case(EVERY_TARGET, BF16, ONE_SAMPLE)}
    (found,) = pool.run(1, measure, cases=list(usual.values()))
    more = {
        name: results[name][1]["activations"] - planned["activations"]
        for name, (_, planned) in zip(usual, found, strict=True)
    }
    width, layers = 64, 4
    assert more == {"two samples": layers * 2 * LENGTH * width * 2, "one sample": 0}

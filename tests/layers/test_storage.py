# SPDX-License-Identifier: Apache-2.0
"""Stored weights: what they remember, their products, and that a shard is its part of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_megatron.layers.frozen import frozen_linear
from lora_megatron.layers.storage import fp8
from lora_megatron.layers.storage.choose import StorageFormat
from lora_megatron.layers.storage.fp8 import quantise_tokens
from lora_megatron.layers.storage.nf4 import LEVELS, nearest_levels
from lora_megatron.layers.storage.stored import Stored, device_of, hand_over, stored_of, writable

CPU = torch.device("cpu")
FORMATS = {
    "fp8": StorageFormat("fp8"),
    "nf4": StorageFormat("nf4"),
    "nf4-fp8": StorageFormat("nf4", "fp8"),
}
OUT, IN = 320, 512  # neither groups of 256 rows nor of 256 blocks come out even


def stored(weight: Tensor, kind: str, axis: int) -> Stored:
    result = FORMATS[kind].make(*weight.shape, device=CPU, axis=axis, group=None)
    result.store(weight)
    return result


def off(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("kind", "error"), [("fp8", 0.027), ("nf4", 0.094)])
def test_normal_weights_are_remembered_as_well_as_the_format_can(
    weight: Tensor, kind: str, error: float, axis: int
) -> None:
    """2^-4 uniform over a binade is 2.6% of the whole; 16 levels of a normal distribution are 9.2%."""
    assert 0.9 * error < off(stored(weight, kind, axis).unpacked(torch.float32), weight) < error


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("size", [2, 4])
def test_a_shard_is_its_part_of_the_whole(weight: Tensor, kind: str, axis: int, size: int) -> None:
    whole = stored(weight, kind, axis)
    parts = [stored(part.contiguous(), kind, axis) for part in weight.chunk(size, axis)]
    joined = torch.cat([part.unpacked(torch.float32) for part in parts], axis)
    assert torch.equal(joined, whole.unpacked(torch.float32))
    if axis == 0:  # tokens are whole on every rank, so the product's columns are equal to the bit
        x = torch.randn(7, IN, generator=torch.Generator().manual_seed(1))
        columns = torch.cat([part.linear(x, None) for part in parts], 1)
        torch.testing.assert_close(columns, whole.linear(x, None), rtol=0, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("kind", "error"), [("fp8", 0.027), ("nf4", 1e-6), ("nf4-fp8", 0.039)])
def test_products_are_those_of_what_is_remembered(weight: Tensor, kind: str, error: float, axis: int) -> None:
    """FP8 adds the rounding of the activations, and NF4 in FP8 that of W once more."""
    one = stored(weight, kind, axis)
    remembered = one.unpacked(torch.float32)
    generator = torch.Generator().manual_seed(2)
    x, grad = torch.randn(40, IN, generator=generator), torch.randn(40, OUT, generator=generator)
    bias = torch.randn(OUT, generator=generator)
    assert off(one.linear(x, bias) - bias, x @ remembered.t()) < error
    assert off(one.input_gradient(grad), grad @ remembered) < error


@pytest.mark.parametrize(("fast_accum", "wanted"), [("none", [0, 0]), ("forward", [1, 0]), ("both", [1, 1])])
@pytest.mark.parametrize(("kind", "gemm"), [("fp8", "bf16"), ("nf4", "fp8")])
def test_which_products_add_up_fast(
    weight: Tensor, kind: str, gemm: str, fast_accum: str, wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    original = fp8.multiply

    def watched(*args: Any, fast: bool, **kwargs: Any) -> Tensor:
        asked.append(fast)
        return original(*args, fast=fast, **kwargs)

    monkeypatch.setattr(fp8, "multiply", watched)
    one = StorageFormat(kind, gemm, fast_accum).make(OUT, IN, device=CPU, axis=0, group=None)
    one.store(weight)
    one.linear(torch.randn(3, IN), None)
    one.input_gradient(torch.randn(3, OUT))
    assert asked == wanted


def test_levels_are_the_nearest() -> None:
    values = torch.linspace(-1, 1, 4001)
    distance = (values[:, None] - torch.tensor(LEVELS)).abs()
    chosen = distance.gather(1, nearest_levels(values)[:, None])[:, 0]
    assert torch.equal(chosen, distance.amin(1))


@pytest.mark.parametrize("kind", FORMATS)
def test_zeros_stay_zeros_and_outliers_do_not_overflow(kind: str) -> None:
    weight = torch.zeros(128, 128)
    weight[3] = 1e30
    for axis in (0, 1):
        one = stored(weight, kind, axis)
        remembered = one.unpacked(torch.float32)
        assert torch.isfinite(remembered).all()
        assert not remembered[:3].any()
        assert torch.isfinite(one.linear(torch.zeros(2, 128), None)).all()


def test_bitsandbytes_reads_our_codes(weight: Tensor) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    one = stored(weight, "nf4", 0)
    state = functional.QuantState(
        absmax=one.block_scales().flatten(),
        shape=weight.shape,
        code=torch.tensor(LEVELS),
        blocksize=64,
        quant_type="nf4",
        dtype=torch.float32,
    )
    theirs = functional.dequantize_4bit(one.packed.view(-1, 1), state)
    torch.testing.assert_close(theirs, one.unpacked(torch.float32), rtol=0, atol=1e-7)


def test_a_token_cut_over_ranks_has_one_scale() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    codes, scale = quantise_tokens(x, factor=None, group=None)
    torch.testing.assert_close(scale[:, 0], x.abs().amax(1) / 448)
    assert off(codes.float() * scale, x) < 0.03


class Layer(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)


@pytest.mark.parametrize("kind", FORMATS)
def test_handed_over_a_weight_is_a_name_without_bytes(weight: Tensor, kind: str) -> None:
    layer = Layer(weight)
    layer.weight.declared = "yes"  # type: ignore[attr-defined]
    hand_over(layer, FORMATS[kind].make(OUT, IN, device=CPU, axis=0, group=None))
    assert layer.weight.is_meta
    assert layer.weight.shape == weight.shape
    assert layer.weight.declared == "yes"
    assert device_of(layer.weight) == CPU
    with writable(layer.weight) as target:
        target.copy_(weight)
    kept = stored_of(layer.weight)
    assert kept is not None
    assert torch.equal(kept.unpacked(torch.float32), stored(weight, kind, 0).unpacked(torch.float32))
    total = sum(buffer.numel() * buffer.element_size() for buffer in layer.buffers())
    assert total < weight.numel() * (1.1 if kind == "fp8" else 0.6)


@pytest.mark.parametrize("kind", FORMATS)
def test_backward_keeps_nothing_of_the_layer(weight: Tensor, kind: str) -> None:
    """Autograd saves no tensor of a stored linear, and its gradient is `input_gradient`'s."""
    layer = Layer(weight)
    hand_over(layer, FORMATS[kind].make(OUT, IN, device=CPU, axis=0, group=None))
    one = stored_of(layer.weight)
    assert one is not None
    one.store(weight)
    saved: list[Tensor] = []
    x = torch.randn(3, 2, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = frozen_linear(x, layer.weight, torch.ones(OUT))
    assert saved == []
    grad = torch.randn_like(y)
    y.backward(grad)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.view(6, IN), one.input_gradient(grad.view(6, OUT)), rtol=0, atol=0)

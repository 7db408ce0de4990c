# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against their references in plain torch, on a GPU; elsewhere only the references run."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_megatron.layers.activation import ACTIVATIONS, Activation
from lora_megatron.layers.low_rank import Update, add_low_rank
from lora_megatron.layers.low_rank_input import low_rank_input
from lora_megatron.layers.qkv import Part, gated_parts, qkv_parts, whole
from lora_megatron.layers.rotary import turned
from lora_megatron.layers.storage import quantised_activation
from lora_megatron.layers.storage.choose import StorageFormat
from lora_megatron.layers.storage.fp8 import multiply, quantise_tokens, transposed_fp8
from lora_megatron.layers.storage.quantised_activation import activated, activation_gradient
from lora_megatron.layers.storage.stored import Stored

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the kernels are Triton's"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def same_bytes(got: Tensor, want: Tensor) -> bool:
    return torch.equal(got.cpu().contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))


@pytest.mark.parametrize("axis", [0, 1])
def test_nf4_is_packed_and_unpacked_as_on_a_cpu(axis: int) -> None:
    weight = torch.randn(320, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    pair: list[Stored] = []
    for device in (CPU, GPU):
        one = StorageFormat("nf4", "fp8").make(320, 512, device=device, axis=axis, group=None)
        one.store(weight.to(device))
        pair.append(one)
    cpu, gpu = pair
    for ours, theirs in zip(gpu.buffers(), cpu.buffers(), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-6, atol=0)
    assert (gpu.unpacked(torch.bfloat16).cpu() != cpu.unpacked(torch.bfloat16)).float().mean() < 1e-4
    x, grad = torch.randn(40, 512), torch.randn(40, 320)
    for name, value in (("linear", x), ("input_gradient", grad)):
        extra = (None,) if name == "linear" else ()
        want = getattr(cpu, name)(value, *extra)
        got = getattr(gpu, name)(value.to(GPU, torch.bfloat16), *extra)
        assert float((got.cpu().float() - want).norm() / want.norm()) < 0.02


def test_many_rows_in_two_launches_have_the_scales_of_one() -> None:
    """Maxima are read by some of a row's threads when others have stored its scale."""
    from lora_megatron.layers.storage.kernels import quantise_rows  # needs Triton

    x = torch.randn(8192, 28672, device=GPU, dtype=torch.bfloat16)
    want = quantise_rows(x, None)
    for _ in range(5):
        got = quantise_rows(x, None, agree=lambda largest: None)
        assert all(
            torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in zip(got, want, strict=True)
        )


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("columns", [512, 5000, 49152])
def test_rows_are_quantised_as_on_a_cpu(columns: int, scaled: bool) -> None:
    x = torch.randn(70, columns, dtype=torch.bfloat16)
    x[3] = 0
    factor = torch.rand(columns) if scaled else None
    codes, scales = quantise_tokens(x, factor=factor, group=None)
    got, got_scales = quantise_tokens(x.to(GPU), factor=None if factor is None else factor.to(GPU), group=None)
    torch.testing.assert_close(got_scales.cpu(), scales, rtol=1e-6, atol=0)
    assert same_bytes(got, codes)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="how far fast sums are off is the hardware's: measured on Hopper (compute capability 9.0), on nothing else",
)
def test_a_product_of_long_rows_that_adds_up_fast() -> None:
    """49152 addends, as many as fc2 has in GPT-3 175B: beside what FP8 itself costs, 2.6e-2 per factor, little."""
    x, weight = (torch.randn(256, 49152, device=GPU) for _ in range(2))
    (a, scale_a), (b, scale_b) = (quantise_tokens(t, factor=None, group=None) for t in (x, weight))
    exact = (a.double() @ b.double().t()) * scale_a * scale_b.t()
    errors = {}
    for fast in (False, True):
        errors[fast] = off(multiply(a, scale_a, b, scale_b.flatten(), torch.bfloat16, fast=fast), exact)
    print("error of a product of 49152 addends, fp32 and fast:", errors)
    assert errors[False] < 2e-3
    assert 2 * errors[False] < errors[True] < 1e-2


def test_fp8_is_transposed() -> None:
    codes = torch.randn(300, 515, device=GPU).to(torch.float8_e4m3fn)
    assert same_bytes(transposed_fp8(codes), codes.cpu().view(torch.uint8).t().contiguous())


QKV = qkv_parts(8, 4, 32)
FUSED = {
    "q": QKV[:1],
    "v": QKV[2:],
    "q and v": (QKV[0], QKV[2]),
    "q, k and v": QKV,
    "gate and up": gated_parts(150),
    "whole": whole("o", 200),
}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("first", [5, 130, 300, 600], ids="rank {}".format)
@pytest.mark.parametrize("parts", FUSED.values(), ids=FUSED)
def test_the_low_rank_update_and_its_gradients(
    parts: tuple[Part, ...], first: int, dtype: torch.dtype, bound: float
) -> None:
    """Of one projection and of several with ranks and scales of their own; more tokens than one program has."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    ranks, scales = (first, 1, 17)[: len(parts)], (1.7, 0.5, -2.0)[: len(parts)]
    fused, u = random(300, parts[0].groups * parts[0].stride), random(300, sum(ranks))
    bs = [random(part.rows, rank) for part, rank in zip(parts, ranks, strict=True)]
    grad = random(*fused.shape)
    results = []
    for device, kind in ((CPU, torch.float64), (GPU, dtype)):
        leaves = [t.to(device, kind, copy=True).requires_grad_() for t in (fused, u, *bs)]
        out = add_low_rank(leaves[0] * 1, Update(parts, scales, leaves[1], tuple(leaves[2:])))
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(device, kind))])
    for want, got in zip(*results, strict=True):
        assert off(got, want) < bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("ranks", [(5, 1, 17), (4, 0, 4), (0, 130, 0)], ids=str)
@pytest.mark.parametrize("groups", [8, 4])
def test_gradients_of_q_k_and_v_are_put_together(
    groups: int, ranks: tuple[int, int, int], dtype: torch.dtype, bound: float
) -> None:
    """The fused gradient to the bit; du and dB as from it, also where dB goes to DDP's sums."""
    generator = torch.Generator().manual_seed(0)
    parts, scales = qkv_parts(8, groups, 32), (1.7, 0.5, -2.0)
    own = [torch.randn(300, part.rows, generator=generator).to(dtype) for part in parts]
    u = torch.randn(300, sum(ranks), generator=generator).to(dtype)
    factors = [
        torch.randn(part.rows, rank, generator=generator).to(dtype) for part, rank in zip(parts, ranks, strict=True)
    ]
    chosen = [index for index, rank in enumerate(ranks) if rank]

    def update(device: torch.device, kind: torch.dtype) -> Update:
        bs = tuple(nn.Parameter(factors[index].to(device, kind)) for index in chosen)
        return Update(tuple(parts[i] for i in chosen), tuple(scales[i] for i in chosen), u.to(device, kind), bs)

    exact = update(CPU, torch.float64)
    fused, du, dbs = exact.gradients_of_parts([grad.double() for grad in own], parts)
    ours = update(GPU, dtype)
    for summed in (False, True):
        bs: tuple[Any, ...] = ours.bs
        for b in bs:
            if summed:
                b.main_grad, b.grad_added_to_main_grad = torch.zeros_like(b, dtype=torch.float32), False
        got, got_du, got_dbs = ours.gradients_of_parts([grad.to(GPU) for grad in own], parts)
        assert torch.equal(got.cpu(), fused.to(dtype))
        assert off(got_du, du) < bound
        for found, want in zip([b.main_grad for b in bs] if summed else got_dbs, dbs, strict=True):
            assert off(found, want) < (3e-6 if summed else bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [5, 130, 300])
@pytest.mark.parametrize("parts", FUSED.values(), ids=FUSED)
def test_gradients_of_factors_are_added_to_ddps_sums(parts: tuple[Part, ...], first: int, dtype: torch.dtype) -> None:
    """Twice, to what is there, not rounded on the way; du is what it is without."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(GPU, dtype)

    ranks, scales = (first, 1, 17)[: len(parts)], (1.7, 0.5, -2.0)[: len(parts)]
    x, fused = random(300, 1, 96), random(300, 1, parts[0].groups * parts[0].stride)
    back, u, back_u = random(*fused.shape), random(300, 1, sum(ranks)), random(300, 1, sum(ranks))
    factors = [nn.Parameter(random(rank, 96)) for rank in ranks]
    bs = [nn.Parameter(random(part.rows, rank)) for part, rank in zip(parts, ranks, strict=True)]

    def backward() -> Tensor:
        leaf = u.clone().requires_grad_()
        add_low_rank(fused * 1, Update(parts, scales, leaf, tuple(bs))).backward(back)
        low_rank_input(x, factors, None)[0].backward(back_u)
        assert leaf.grad is not None
        return leaf.grad

    du = backward()
    summed: list[Any] = [*factors, *bs]  # with DDP's attributes, which no type knows
    for parameter in summed:
        parameter.main_grad, parameter.grad_added_to_main_grad = torch.ones_like(parameter, dtype=torch.float32), False
    assert torch.equal(backward(), du)
    assert torch.equal(backward(), du)
    values, places = back.double().view(300, -1), torch.arange(fused.shape[-1], device=GPU)
    columns = [part.rows_of(places).flatten() for part in parts]
    us = u.double().view(300, -1).split(ranks, -1)
    want = [*(back_u.double().view(300, -1).t() @ x.double().view(300, -1)).split(ranks)]
    want += [s * values[:, own].t() @ one for s, own, one in zip(scales, columns, us, strict=True)]
    for parameter, gradient in zip(summed, want, strict=True):
        assert parameter.grad_added_to_main_grad
        assert off(parameter.main_grad, 1 + 2 * gradient) < 3e-6


@pytest.mark.parametrize("rotary", [32, 20])
@pytest.mark.parametrize("rows", [1, 3], ids=["angles shared", "angles of each row"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)])
def test_queries_are_turned_and_gradients_turned_back(rotary: int, rows: int, dtype: torch.dtype, bound: float) -> None:
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(50, 3, 4, 18 * 32, generator=generator).to(dtype)
    x = fused[..., : 16 * 32].reshape(50, 3, 64, 32)[:, :, :33]
    angles = torch.rand(50, rows, 1, rotary // 2, generator=generator).repeat(1, 1, 1, 2) * 8000
    for back in (False, True):
        assert off(turned(x.to(GPU), angles.to(GPU), back=back), turned(x.double(), angles.double(), back=back)) < bound
    q = fused[..., : 16 * 32].unflatten(-1, (16, 32))  # [s, b, groups, heads of a group, d]: no view of all heads
    assert torch.equal(turned(q.to(GPU), angles.to(GPU)), turned(q.to(GPU).flatten(2, 3), angles.to(GPU)))
    k = fused[..., -64:-32]  # a view with gaps
    assert off(turned(k.to(GPU), angles.to(GPU)), turned(k.double(), angles.double())) < bound


def off(got: Tensor, want: Tensor) -> float:
    want = want.cpu().double()
    return float((got.detach().cpu().double() - want).norm() / want.norm())


@pytest.mark.parametrize("agreed", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_activation_and_its_gradient_beside_their_fp8_codes(
    name: str, gated: bool, scaled: bool, agreed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes are those of the reference but for roundings that fall the other way, with what is kept and without."""
    if agreed:  # measured, agreed upon over (here) no other ranks, and cast: two launches
        monkeypatch.setattr(quantised_activation, "agree_over", lambda group: lambda largest: None)
    activation, columns, width = Activation(name, gated), 5000, 10000 if gated else 5000
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(40, n, generator=generator).bfloat16() for n in (width, columns))
    bias = torch.randn(width, generator=generator).bfloat16()
    factors = [torch.rand(n, generator=generator) + 0.5 if scaled else None for n in (columns, width)]
    on_gpu = [None if factor is None else factor.to(GPU) for factor in factors]
    here, there = (x, bias), (x.to(GPU), bias.to(GPU))
    wanted = (
        activated(activation, *here, factor=factors[0], group=None, keep=True),
        activation_gradient(activation, *here, grad, factor=factors[1], group=None, keep=True, keep_y=True),
    )
    for kept in (True, False):
        got = (
            activated(activation, *there, factor=on_gpu[0], group=None, keep=kept),
            activation_gradient(activation, *there, grad.to(GPU), factor=on_gpu[1], group=None, keep=kept, keep_y=kept),
        )
        for ours, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(ours.quantised.scale.cpu(), theirs.quantised.scale, rtol=2**-7, atol=0)
            assert off(ours.quantised.codes.float(), theirs.quantised.codes.float()) < 0.01
            for mine, want in zip(ours[1:], theirs[1:], strict=True):
                assert (mine is not None) == kept
                if mine is not None:
                    assert mine.dtype == torch.bfloat16
                    assert off(mine, want) < 2e-3


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_ranks_are_rounded_once(ranks: int, dtype: torch.dtype) -> None:
    from lora_megatron.layers import exchange_kernels  # needs Triton

    generator = torch.Generator().manual_seed(1)
    shapes = (37, 129), (37, 1, 5), (4096, 3, 2), (1, 1, 1)
    first, *others = (torch.randn(ranks, *shape, generator=generator).to("cuda", dtype) for shape in shapes)
    for addends in ([first], *([first, other] for other in others)):
        for got, each in zip(exchange_kernels.sums_in_order(addends), addends, strict=True):
            assert torch.equal(got, functools.reduce(torch.add, each.float().unbind()).to(dtype))


@pytest.mark.parametrize("ranks", [(4,), (16, 16), (5, 1, 17)], ids=str)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_adapters_read_has_their_part_added_in_the_sum(
    dtype: torch.dtype, count: int, ranks: tuple[int, ...]
) -> None:
    """dx = sum of dx_i + du A, rounded once, of du as it is written: summed and rounded."""
    from lora_megatron.layers import exchange_kernels  # needs Triton

    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(count, 150, 300, generator=generator).to(GPU, dtype)
    beside = torch.randn(count, 150, 1, sum(ranks), generator=generator).to(GPU, dtype)
    factors = [torch.randn(rank, 300, generator=generator).to(GPU, dtype) for rank in ranks]
    assert exchange_kernels.can_add([rows, beside], factors)
    assert not exchange_kernels.can_add([rows, beside], ())
    got, du = exchange_kernels.sums_with_products([rows, beside], factors)
    assert torch.equal(du, exchange_kernels.sums_in_order([rows, beside])[1])
    want = rows.double().sum(0) + du.double().view(150, -1) @ torch.cat(factors).double()
    assert off(got, want) < (1e-6 if dtype == torch.float32 else 3e-3)

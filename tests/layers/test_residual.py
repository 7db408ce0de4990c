# SPDX-License-Identifier: Apache-2.0
"""Update, bias and residual in one addition give what megatron-core's addition gives of the updated output.

On a CPU to the bit: torch's operations are the same. On a GPU the kernel rounds once where those round three times.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from torch import Tensor, nn

from lora_megatron.layers import residual
from lora_megatron.layers.low_rank import Update, add_low_rank
from lora_megatron.layers.qkv import whole
from lora_megatron.layers.residual import BiasAndUpdate, get_residual_add

CPU = torch.device("cpu")
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the kernel is Triton's"),
]
gpu = pytest.mark.parametrize("device", [pytest.param(torch.device("cuda"), marks=on_gpu, id="gpu")])
SCALE = 1.7


class Problem:
    """An output y [s, b, h] with all that is added to it, and a gradient of the sum."""

    def __init__(self, shape: tuple[int, int, int], rank: int, *, bias: bool, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(dtype)

        width = shape[-1]
        self.leaves = {"y": random(*shape), "residual": random(*shape), "u": random(*shape[:-1], rank)}
        self.leaves |= {"b": random(width, rank), **({"bias": random(width)} if bias else {})}
        self.back = random(*shape)

    def added(self, add: Any, device: torch.device = CPU, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """h = add(y, residual, bias, update), and every gradient."""
        leaves = {name: t.to(device, dtype, copy=True).requires_grad_() for name, t in self.leaves.items()}
        update = Update(whole("o", self.back.shape[-1]), (SCALE,), leaves["u"], (leaves["b"],))
        h = add(leaves["y"] * 1, leaves["residual"], leaves.get("bias"), update)
        gradients = torch.autograd.grad(h, list(leaves.values()), self.back.to(device, dtype))
        return {"h": h.detach(), **dict(zip(leaves, gradients, strict=True))}


def exactly(y: Tensor, residual: Tensor, bias: Tensor | None, update: Update) -> Tensor:
    """Plain algebra."""
    h = residual + y + SCALE * update.u @ update.bs[0].t()
    return h if bias is None else h + bias


def together(y: Tensor, residual: Tensor, bias: Tensor | None, update: Update, **dropout: Any) -> Tensor:
    """As a layer of megatron-core does."""
    settings = {"training": True, "probability": 0.0, **dropout}
    pair = y, BiasAndUpdate.of(bias, update)
    return get_residual_add(settings["training"], False)(pair, residual, settings["probability"])


def apart(y: Tensor, residual: Tensor, bias: Tensor | None, update: Update, **dropout: Any) -> Tensor:
    """The update by the row layer, the rest by megatron-core."""
    settings = {"training": True, "probability": 0.0, **dropout}
    pair = add_low_rank(y, update), bias
    result: Tensor = get_bias_dropout_add(settings["training"], False)(pair, residual, settings["probability"])
    return result


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    assert list(got) == list(want)
    return {name: float((got[name].cpu().double() - w.cpu()).norm() / w.cpu().norm()) for name, w in want.items()}


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return list(got) == list(want) and all(torch.equal(got[name], tensor) for name, tensor in want.items())


@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_plain_algebra(bias: bool) -> None:
    problem = Problem((5, 2, 12), 3, bias=bias, dtype=torch.float64)
    assert max(errors(problem.added(together), problem.added(exactly)).values()) < 1e-14


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_it_is_megatrons_to_the_bit(dtype: torch.dtype, bias: bool) -> None:
    problem = Problem((5, 2, 12), 3, bias=bias, dtype=dtype)
    assert same(problem.added(together), problem.added(apart))


def test_it_is_written_over_the_output_alone() -> None:
    """Autograd keeps nothing of it, so that nothing more lives than without adapters."""
    y, kept, u, b = torch.ones(2, 1, 4), torch.ones(2, 1, 4), torch.ones(2, 1, 3), torch.ones(4, 3)
    saved: list[Tensor] = []
    leaf, factor = u.requires_grad_(), nn.Parameter(b)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        h = together(y, kept, None, Update(whole("o", 4), (2.0,), leaf, (factor,)))
    assert h.data_ptr() == y.data_ptr()
    assert h._base is None, "a view would make megatron-core copy it"
    assert torch.equal(h, torch.full((2, 1, 4), 8.0))
    assert torch.equal(kept, torch.ones(2, 1, 4))
    assert sorted(tuple(t.shape) for t in saved) == [(2, 1, 3), (4, 3)]


@pytest.mark.parametrize("bias", [False, True])
def test_hidden_dropout_drops_of_the_update_too(bias: bool) -> None:
    problem, found = Problem((5, 2, 12), 3, bias=bias, dtype=torch.float32), []
    for add in (together, apart):
        torch.manual_seed(1)
        found.append(problem.added(lambda *all_of_it, add=add: add(*all_of_it, probability=0.4)))
    assert same(*found)
    residual = problem.leaves["residual"]
    assert 0.2 < float((found[0]["h"] == residual).float().mean()) < 0.6, "dropped with bias and update"
    evaluated = problem.added(lambda *all_of_it: together(*all_of_it, training=False, probability=0.4))
    assert same(evaluated, problem.added(together)), "in training only"


def test_what_ran_without_gradients_is_added_without() -> None:
    """megatron-core records its addition always: a chain of evaluated layers would keep each one's u."""
    parameter = nn.Parameter(torch.ones(4, 3))
    update = Update(whole("o", 4), (1.0,), torch.ones(2, 1, 3), (parameter,))
    for probability in (0.0, 0.5):
        with torch.no_grad():
            pair = torch.ones(2, 1, 4), BiasAndUpdate.of(None, update)
        with torch.enable_grad():
            h = get_residual_add(True, False)(pair, torch.ones(2, 1, 4), probability)
        assert not h.requires_grad


def test_other_pairs_are_megatrons() -> None:
    y, kept = torch.full((2, 1, 4), 2.0), torch.ones(2, 1, 4)
    for bias, want in ((None, 3.0), (torch.ones(4), 4.0)):
        with torch.no_grad():
            assert torch.equal(get_residual_add(False, False)((y.clone(), bias), kept, 0.0), torch.full_like(y, want))


@pytest.mark.parametrize("why", ["no kernel, and a compiled addition", "a residual of another type"])
def test_where_it_is_no_gain_megatron_adds_to_the_updated_output(why: str) -> None:
    problem, seen = Problem((5, 2, 12), 3, bias=True, dtype=torch.float32), []
    compiled = why.startswith("no kernel")

    def megatrons(pair: tuple[Tensor, Any], kept: Tensor, probability: float) -> Tensor:
        seen.append(pair)
        return pair[0] + pair[1] + kept

    def add(y: Tensor, kept: Tensor, bias: Tensor | None, update: Update) -> Tensor:
        kept = kept if compiled else kept.double()
        return get_residual_add(True, compiled)((y, BiasAndUpdate.of(bias, update)), kept, 0.0).float()

    with mock.patch.object(residual, "get_bias_dropout_add", return_value=megatrons):
        found = problem.added(add)
    assert len(seen) == 1
    assert max(errors(found, problem.added(exactly, dtype=torch.float64)).values()) < 1e-6


@gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [1, 5, 16, 130])
@pytest.mark.parametrize("shape", [(37, 1, 515), (3, 5, 64), (1, 1, 2)], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
def test_in_one_pass_it_is_plain_algebra(
    device: torch.device, dtype: torch.dtype, bound: float, shape: tuple[int, int, int], rank: int, bias: bool
) -> None:
    """Of tokens and columns that fill no tile; to the bit the same when it is done again."""
    problem = Problem(shape, rank, bias=bias, dtype=dtype)
    got = problem.added(together, device)
    want = problem.added(exactly, dtype=torch.float64)
    assert max(errors(got, want).values()) < bound
    assert same(problem.added(together, device), got)


@gpu
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_rounded_once(device: torch.device, bias: bool) -> None:
    """bf16 of small whole numbers: each sum is exact in fp32 and none of those on the way is a bf16 number."""
    problem = Problem((33, 1, 300), 4, bias=bias, dtype=torch.bfloat16)
    for name, tensor in problem.leaves.items():
        step = {"y": 64.0, "residual": -64.0}.get(name, 1.0)
        tensor.copy_((tensor * 8).round().clamp(-4, 4) + step * 8)
    with mock.patch(f"{__name__}.SCALE", 1.0):
        got = problem.added(together, device)["h"].cpu()
        want = problem.added(exactly, dtype=torch.float64)["h"]
        assert torch.equal(got, want.bfloat16())
        assert not torch.equal(problem.added(apart)["h"], got), "roundings on the way would be seen"


@gpu
def test_nothing_behind_the_output_is_written(device: torch.device) -> None:
    """Programs at the end of tokens and columns have room for more of both."""
    memory, ones = (torch.ones(40, 1, 515, device=device) for _ in range(2))
    update = Update(whole("o", 515), (2.0,), torch.ones(37, 1, 3, device=device), (torch.ones(515, 3, device=device),))
    with torch.no_grad():
        together(memory[:37], ones[:37], None, update)
    assert torch.equal(memory[:37], 8 * ones[:37])
    assert torch.equal(memory[37:], ones[37:])


@gpu
@pytest.mark.parametrize("bias", [False, True])
def test_of_gpt3s_width_it_is_what_two_additions_give(device: torch.device, bias: bool) -> None:
    problem = Problem((2048, 1, 12288), 16, bias=bias, dtype=torch.bfloat16)
    got, other = (problem.added(add, device) for add in (together, apart))
    want = problem.added(exactly, device, torch.float32)
    assert all(torch.equal(got[name], other[name]) for name in ("y", "residual", "u", "b")), "gradients, to the bit"
    assert errors(got, want)["h"] < errors(other, want)["h"] < 6e-3
    assert max(errors(got, want).values()) < 6e-3

# SPDX-License-Identifier: Apache-2.0
"""fc2's u2 = y A^T inside the activation's pass: what the pass makes on a GPU, and when it is taken."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_megatron.layers import adapted_activation
from lora_megatron.layers import mlp_adapter_tiles as tiles
from lora_megatron.layers.adapted_activation import AdaptedActivation
from lora_megatron.layers.dropout import Dropout
from tests.layers.test_mlp_adapters import COLUMNS, CPU, TOKENS, Problem, on_gpu

SPAN = 128
ADAPTED = ["fc1 and fc2", "gate, up and fc2", "up and fc2"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 16], ids="rank {}".format)
@pytest.mark.parametrize("adapted", ADAPTED)
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        pytest.param(torch.float32, 2e-6, id="fp32"),
        pytest.param(torch.bfloat16, 3e-3, id="bf16"),
        pytest.param(torch.float16, 4e-4, id="fp16"),
    ],
)
@pytest.mark.parametrize("device", [pytest.param(torch.device("cuda"), marks=on_gpu, id="gpu")])
def test_the_pass_sums_u2_over_spans_of_columns(
    device: torch.device,
    dtype: torch.dtype,
    bound: float,
    adapted: str,
    rank: int,
    bias: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three of them, the last one cut short, as are the last tokens; of y as it was rounded, so that the product of
    that in fp64 is off by no more than the sum in fp32 and one rounding. And to the bit the same when done again."""
    from lora_megatron.layers import mlp_adapters  # needs Triton

    monkeypatch.setattr(tiles, "PROJECTION_TILES", dict.fromkeys((2, 4), (tiles.Tile(64, 64, SPAN, 4),) * 2))
    problem = Problem("silu", adapted, bias=bias, ranks=(16, 3, rank), dtype=dtype)
    gated = problem.activation.gated
    between, z, *_ = problem.on(device)
    update, a = between.update, between.a
    assert update is not None
    assert a is not None
    kept = z.clone()
    with torch.no_grad():
        y, u2 = mlp_adapters.activate_and_project(z, between.bias, update, a, "silu", gated=gated)
        again = mlp_adapters.activate_and_project(z, between.bias, update, a, "silu", gated=gated)
        alone = mlp_adapters.activate(z, between.bias, update, "silu", gated=gated)
    assert torch.equal(z, kept)
    assert all(torch.equal(one, other) for one, other in zip((y, u2), again, strict=True))
    assert (u2.shape, u2.dtype, y.dtype) == ((TOKENS, rank), dtype, dtype)
    assert off(y, alone.double()) < bound
    assert off(y, problem.wanted()["y"]) < bound
    assert off(u2, y.double() @ a.double().t()) < bound


def off(got: Tensor, want: Tensor) -> float:
    return float((got.detach().cpu().double() - want.detach().cpu()).norm() / want.norm())


@pytest.mark.parametrize("tokens", [1, 300, 2048])
@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize("columns", [150, 2048, 49152])
def test_addends_of_u2_are_one_a_span_and_no_peak(columns: int, rank: int, tokens: int) -> None:
    """Each span's [tokens, r], one behind the other. A backward pass has all that a forward pass has and dz besides,
    which is more: so the plan counts none of these."""
    for itemsize, pair in tiles.PROJECTION_TILES.items():
        for tile in pair:
            cut = tiles.projection_addends_of(rank, tokens, columns, tile, CPU)
            pieces = -(-columns // tile.span)
            assert cut.table.tolist() == [[0, pieces, tokens * rank, rank, rank, 0]]
            assert (cut.starts, cut.size, cut.longest) == ((0,), pieces * tokens * rank, tokens * rank)
            assert 4 * cut.size < itemsize * tokens * columns


PROBLEM = Problem("gelu_tanh", "fc1 and fc2", bias=True, ranks=(4, 16, 5), dtype=torch.float32)


def forward_through(
    monkeypatch: pytest.MonkeyPatch, between: AdaptedActivation, z: Tensor, *, fewest: int = TOKENS
) -> tuple[list[str], Tensor | None]:
    """The passes of a forward pass, as if on a GPU, and u2; each gives ones for y, and for u2 twos.

    fewest: tokens for which one pass is to make both.
    """
    called: list[str] = []

    def activate(*_: Any, **__: Any) -> Tensor:
        called.append("activate")
        return torch.ones(TOKENS, COLUMNS)

    def activate_and_project(*args: Any, **__: Any) -> tuple[Tensor, Tensor]:
        called.append("activate_and_project")
        return torch.ones(TOKENS, COLUMNS), torch.full((TOKENS, args[3].shape[0]), 2.0)

    passes = SimpleNamespace(activate=activate, activate_and_project=activate_and_project)
    monkeypatch.setattr(adapted_activation, "kernels", passes)
    monkeypatch.setattr(adapted_activation, "FEWEST_TOKENS", fewest)
    monkeypatch.setattr(AdaptedActivation, "_in_one_pass", lambda self, z: True)
    with torch.no_grad():
        (y,), u2 = between.forward(z, (-1, 3))
    assert y.shape == (TOKENS, COLUMNS)
    return called, u2


def test_u2_is_what_the_pass_made(monkeypatch: pytest.MonkeyPatch) -> None:
    between, z, *_ = PROBLEM.on(CPU)
    called, u2 = forward_through(monkeypatch, between, z)
    assert called == ["activate_and_project"]
    assert u2 is not None
    assert torch.equal(u2, torch.full((TOKENS // 3, 3, 5), 2.0))


def test_of_few_tokens_u2_is_a_product_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    between, z, *_ = PROBLEM.on(CPU)
    called, u2 = forward_through(monkeypatch, between, z, fewest=TOKENS + 1)
    assert called == ["activate"]
    assert u2 is not None
    assert between.a is not None
    torch.testing.assert_close(u2.view(TOKENS, -1), torch.ones(TOKENS, COLUMNS) @ between.a.t())


def test_what_drops_out_is_a_product_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """So is that without fc1's adapters, whose y is the activation's own; and without fc2's there is none."""
    between, z, *_ = PROBLEM.on(CPU)
    dropping = Dropout(0.5, seed=1, first_sample=0)
    called, u2 = forward_through(monkeypatch, replace(between, dropout=dropping), z)
    assert called == ["activate"]
    assert u2 is not None
    assert between.a is not None
    torch.testing.assert_close(u2, dropping(torch.ones(TOKENS // 3, 3, COLUMNS)) @ between.a.t())
    called, u2 = forward_through(monkeypatch, replace(between, a=None), z)
    assert (called, u2) == (["activate"], None)
    called, u2 = forward_through(monkeypatch, replace(between, update=None), z)
    assert called == []
    assert u2 is not None
    y = between.activation.exactly(z, between.bias)
    torch.testing.assert_close(u2.view(TOKENS, -1), y @ between.a.t())

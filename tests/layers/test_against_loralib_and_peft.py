# SPDX-License-Identifier: Apache-2.0
"""Our layers against loralib's and PEFT's with the same weights: forward, gradients and three AdamW steps.

Each runs unsharded in one worker process; that sharded equals unsharded is the oracle's affair.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_megatron.config import ModelSection
from lora_megatron.layers.column import LoraColumnParallelLinear
from lora_megatron.layers.lora import Adapter, AdapterSet, scaling
from lora_megatron.layers.qkv import qkv_parts, whole
from lora_megatron.layers.row import LoraRowParallelLinear
from lora_megatron.model.build import BuildOptions, megatron_config
from lora_megatron.model.presets import resolve_shape
from lora_megatron.parallel.groups import Layout, build_mesh
from tests.pool import Pool

IN, ALPHA = 24, 6.0
HEADS, GROUPS, HEAD_DIM = 4, 2, 3
LAYERS = {"column": LoraColumnParallelLinear, "row": LoraRowParallelLinear}


def our_layer(kind: str, out: int, ranks: dict[str, int]) -> Any:
    """One of our layers with random weight, bias, A and B, unsharded."""
    build_mesh(Layout(), seed=1, timeout_minutes=2)
    section = ModelSection(num_layers=1, hidden_size=IN, num_attention_heads=HEADS, max_position_embeddings=8)
    config = megatron_config(resolve_shape(section, tokenizer_vocab_size=100), Layout(), BuildOptions())
    adapters = AdapterSet("layer", tuple(Adapter(t, r, scaling(ALPHA, r)) for t, r in ranks.items()))
    extra: dict[str, Any] = {"input_is_parallel": True} if kind == "row" else {"parts": lambda rows: whole("o", rows)}
    if len(ranks) > 1:
        extra["parts"] = lambda rows: qkv_parts(HEADS, GROUPS, HEAD_DIM)
    layer = LAYERS[kind](
        IN,
        out,
        config=config,
        init_method=None,
        bias=True,
        has_bias=True,
        skip_bias_add=False,
        adapters=adapters,
        **extra,
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in layer.named_parameters():
        if not name.endswith("lora_A"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        parameter.requires_grad_("lora_" in name)
    return layer


def loralib_linear(weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
    import loralib

    reference = loralib.Linear(IN, len(weight), r=len(a), lora_alpha=ALPHA)
    return _filled(reference, reference.weight, reference.bias, weight, bias, reference.lora_A, reference.lora_B, a, b)


def peft_linear(weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
    from peft import LoraConfig, get_peft_model

    base = nn.Sequential(nn.Linear(IN, len(weight)))
    reference = get_peft_model(base, LoraConfig(r=len(a), lora_alpha=ALPHA, target_modules=["0"]))
    layer = reference.base_model.model[0]
    linear, lora_a, lora_b = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return _filled(reference, linear.weight, linear.bias, weight, bias, lora_a, lora_b, a, b)


def _filled(module: nn.Module, *tensors: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
    """Copy our weight, bias, A and B into the reference; return it and its trained A and B."""
    w, c, weight, bias, lora_a, lora_b, a, b = tensors
    with torch.no_grad():
        for theirs, ours in ((w, weight), (c, bias), (lora_a, a), (lora_b, b)):
            theirs.copy_(ours)
    c.requires_grad_(False)
    return module, lora_a, lora_b


REFERENCES = {"loralib": loralib_linear, "peft": peft_linear}


def steps_beside_reference(kind: str, reference: str, ranks: dict[str, int], steps: int = 3) -> int:
    """AdamW on our layer and on one reference layer per projection, fed alike; everything stays equal."""
    parts = qkv_parts(HEADS, GROUPS, HEAD_DIM) if len(ranks) > 1 else whole("o", 20)
    out = sum(part.rows for part in parts)
    layer = our_layer(kind, out, ranks)
    references = {}
    for part in parts:
        rows = part.of(torch.arange(out)).flatten()  # this projection's rows of the fused weight, in order
        pair = layer.adapters[part.name]
        references[part.name] = REFERENCES[reference](layer.weight[rows], layer.bias[rows], pair.lora_A, pair.lora_B)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    their_parameters = [tensor for _, a, b in references.values() for tensor in (a, b)]
    their_optimizer = torch.optim.AdamW(their_parameters, lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    close, compared = {"rtol": 1e-5, "atol": 4e-6}, 0
    for _ in range(steps):
        x = torch.randn(5, 2, IN, generator=generator)
        weights = torch.randn(5, 2, out, generator=generator)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        result, _ = layer(ours)
        optimizer.zero_grad()
        their_optimizer.zero_grad()
        (result * weights).sum().backward()
        total = torch.zeros(())
        for part in parts:
            expected = references[part.name][0](theirs)
            torch.testing.assert_close(part.of(result).flatten(-2), expected, **close)
            total = total + (expected * part.of(weights).flatten(-2)).sum()
        total.backward()
        torch.testing.assert_close(ours.grad, theirs.grad, **close)
        for name, (_, a, b) in references.items():
            pair = layer.adapters[name]
            for our_factor, their_factor in ((pair.lora_A, a), (pair.lora_B, b)):
                torch.testing.assert_close(our_factor.grad, their_factor.grad, **close)
                compared += 1
        optimizer.step()
        their_optimizer.step()
        for name, (_, a, b) in references.items():
            torch.testing.assert_close(layer.adapters[name].lora_A, a, **close)
            torch.testing.assert_close(layer.adapters[name].lora_B, b, **close)
    return compared


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize(
    ("kind", "ranks"),
    [("column", {"o": 3}), ("row", {"o": 3}), ("column", {"q": 4, "k": 1, "v": 2})],
    ids=["column", "row", "fused-qkv"],
)
def test_layer_equals(pool: Pool, kind: str, ranks: dict[str, int], reference: str) -> None:
    assert pool.run(1, steps_beside_reference, kind=kind, reference=reference, ranks=ranks) == [3 * 2 * len(ranks)]


def merged_linear() -> float:
    """loralib's MergedLinear is q, k and v in equal thirds: with our rows brought into that order it agrees."""
    import loralib

    rank = 2
    out = (HEADS + 2 * HEADS) * HEAD_DIM
    build_mesh(Layout(), seed=1, timeout_minutes=2)
    section = ModelSection(num_layers=1, hidden_size=IN, num_attention_heads=HEADS, max_position_embeddings=8)
    config = megatron_config(resolve_shape(section, tokenizer_vocab_size=100), Layout(), BuildOptions())
    layer = LoraColumnParallelLinear(
        IN,
        out,
        config=config,
        init_method=None,
        bias=False,
        has_bias=False,
        parts=lambda rows: qkv_parts(HEADS, HEADS, HEAD_DIM),
        adapters=AdapterSet("layer", tuple(Adapter(t, rank, scaling(ALPHA, rank)) for t in "qv")),
    )
    generator = torch.Generator().manual_seed(2)
    for name, parameter in layer.named_parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        parameter.requires_grad_("lora_" in name)
    reference = loralib.MergedLinear(IN, out, rank, ALPHA, enable_lora=[True, False, True], bias=False)
    rows = torch.cat([part.of(torch.arange(out)).flatten() for part in qkv_parts(HEADS, HEADS, HEAD_DIM)])
    pairs = [layer.adapters["q"], layer.adapters["v"]]
    with torch.no_grad():
        reference.weight.copy_(layer.weight[rows])
        reference.lora_A.copy_(torch.cat([pair.lora_A for pair in pairs]))
        reference.lora_B.copy_(torch.cat([pair.lora_B for pair in pairs]))
    x, weights = torch.randn(5, 2, IN, generator=generator), torch.randn(5, 2, out, generator=generator)
    ours, theirs = layer(x)[0][..., rows], reference(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    close = {"rtol": 1e-4, "atol": 1e-3}  # gradients are some hundreds in size
    torch.testing.assert_close(torch.cat([pair.lora_A.grad for pair in pairs]), reference.lora_A.grad, **close)
    torch.testing.assert_close(torch.cat([pair.lora_B.grad for pair in pairs]), reference.lora_B.grad, **close)
    return float(theirs.abs().max())


def test_fused_qkv_equals_loralibs_merged_linear(pool: Pool) -> None:
    assert pool.run(1, merged_linear)[0] > 1

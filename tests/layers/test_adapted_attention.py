# SPDX-License-Identifier: Apache-2.0
"""q, k and v with an update, split in one function: the values and gradients of plain algebra, and of megatron-core."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from lora_megatron.layers import adapted_attention
from lora_megatron.layers.adapted_attention import update_and_split
from lora_megatron.layers.low_rank import Update, add_low_rank
from lora_megatron.layers.qkv import Part, qkv_parts
from tests.pool import Pool
from tests.twin import Experiment, Record, train_twin

SHAPES = {"a group for each head": (4, 4, 6), "two heads in a group": (4, 2, 6), "one group": (4, 1, 6)}
ADAPTED = {"q": (3, 0, 0), "q and v": (4, 0, 2), "k": (0, 5, 0), "q, k and v": (3, 1, 2)}


def problem(shape: str, adapted: str) -> tuple[Any, Tensor, Tensor, tuple[Part, ...], tuple[float, ...], list[Tensor]]:
    """All parts, fused [3, 2, n], u, the adapted parts, their scales and B's, in fp64."""
    generator = torch.Generator().manual_seed(1)
    all_parts, ranks = qkv_parts(*SHAPES[shape]), ADAPTED[adapted]
    chosen = [(part, rank) for part, rank in zip(all_parts, ranks, strict=True) if rank]
    fused = torch.randn(3, 2, all_parts[0].groups * all_parts[0].stride, generator=generator, dtype=torch.float64)
    u = torch.randn(3, 2, sum(ranks), generator=generator, dtype=torch.float64)
    bs = [torch.randn(part.rows, rank, generator=generator, dtype=torch.float64) for part, rank in chosen]
    return all_parts, fused, u, tuple(part for part, _ in chosen), (0.5, -2.0, 3.0)[: len(chosen)], bs


@pytest.mark.parametrize("adapted", ADAPTED)
@pytest.mark.parametrize("shape", SHAPES)
def test_parts_and_gradients_are_those_of_update_and_split_apart(shape: str, adapted: str) -> None:
    all_parts, fused, u, parts, scales, bs = problem(shape, adapted)
    generator = torch.Generator().manual_seed(2)
    back = [torch.randn(part.of(fused).shape, generator=generator, dtype=torch.float64) for part in all_parts]
    results = []
    for together in (True, False):
        leaves = [t.clone().requires_grad_() for t in (fused, u, *bs)]
        update = Update(parts, scales, leaves[1], tuple(leaves[2:]))
        made = leaves[0] * 1
        place = made.data_ptr()
        if together:
            split = update_and_split(made, update, all_parts)
            assert split[0].data_ptr() == place, "views of what the product made"
        else:
            whole = add_low_rank(made, update)
            split = tuple(part.of(whole) for part in all_parts)
        loss = torch.stack([(one * weight).sum() for one, weight in zip(split, back, strict=True)]).sum()
        results.append([*split, *torch.autograd.grad(loss, leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_a_part_that_nobody_reads_has_no_gradient() -> None:
    all_parts, fused, u, parts, scales, bs = problem("two heads in a group", "q and v")
    leaf = fused.requires_grad_()
    query, _, _ = update_and_split(leaf * 1, Update(parts, scales, u, tuple(bs)), all_parts)
    (grad,) = torch.autograd.grad(query.sum(), [leaf])
    assert torch.equal(all_parts[0].of(grad), torch.ones_like(query))
    assert not all_parts[1].of(grad).any()
    assert not all_parts[2].of(grad).any()


def test_gradients_of_factors_are_added_to_ddps_sums() -> None:
    all_parts, fused, u, parts, scales, bs = problem("a group for each head", "q and v")
    factors: list[Any] = [nn.Parameter(b.float()) for b in bs]
    for factor in factors:
        factor.main_grad, factor.grad_added_to_main_grad = torch.ones_like(factor), False
    update = Update(parts, scales, u.float(), tuple(factors))
    query, _, value = update_and_split(fused.float().requires_grad_() * 1, update, all_parts)
    (query.sum() + 2 * value.sum()).backward()
    for factor, scale, times, mine in zip(factors, scales, (1, 2), u.split([4, 2], -1), strict=True):
        assert factor.grad_added_to_main_grad
        want = 1 + times * scale * mine.float().sum((0, 1)).expand(factor.shape)
        torch.testing.assert_close(factor.main_grad, want, rtol=1e-5, atol=1e-5)


def test_parts_must_leave_no_holes() -> None:
    all_parts, fused, u, parts, scales, bs = problem("one group", "q")
    with pytest.raises(AssertionError, match="holes"):
        update_and_split(fused, Update(parts, scales, u, tuple(bs)), all_parts[:2])


def train_both(experiment: Experiment) -> tuple[Record | None, Record | None, int]:
    """The model as it is, and with megatron-core's way to q, k and v; and how often the first went its own."""
    with mock.patch.object(adapted_attention, "update_and_split", side_effect=update_and_split) as asked:
        ours = train_twin(experiment)
    with mock.patch.object(adapted_attention.AdaptedAttention, "_is_plain", return_value=False):
        return ours, train_twin(experiment), asked.call_count


GPT = Experiment(model={"preset": "tiny", "num_layers": 2}, steps=2)
LLAMA = replace(GPT, model={"preset": "tiny-llama", "num_layers": 2})
MODELS = {
    "gpt": GPT,
    "q and v": replace(GPT, method={"targets": {"q": 4, "v": 2}}),
    "llama": LLAMA,
    "bf16": replace(LLAMA, precision="bf16"),
    "recomputed": replace(GPT, recompute="full"),
    "dropout": replace(GPT, dropout=0.3),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_what_it_is_with_megatron_cores_way_to_q_k_and_v(pool: Pool, name: str) -> None:
    """To the bit: losses, gradients and parameters."""
    experiment = MODELS[name]
    ours, theirs, times = pool.run(1, train_both, experiment=experiment)[0]
    # Once a layer and microbatch that autograd records: of the twin's evaluation and of each step.
    assert times == 2 * experiment.global_batch_size * (1 + experiment.steps)
    assert ours["loss"] == theirs["loss"]
    for kind in ("grads", "values"):
        for got, want in zip(ours[kind], theirs[kind], strict=True):
            assert list(got) == list(want)
            assert [one for one in want if not torch.equal(got[one], want[one])] == []


UNLIKE = {
    "norms of q and k": replace(LLAMA, model={**LLAMA.model, "qk_norm": True}),
    "no adapter": replace(GPT, method={"targets": {"o": 4, "fc1": 2}}),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_what_stands_between_goes_megatron_cores_way(pool: Pool, name: str) -> None:
    ours, theirs, times = pool.run(1, train_both, experiment=replace(UNLIKE[name], steps=1))[0]
    assert times == 0
    assert ours["loss"] == theirs["loss"]

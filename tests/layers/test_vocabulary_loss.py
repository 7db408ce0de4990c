# SPDX-License-Identifier: Apache-2.0
"""The loss over a cut vocabulary, chunk by chunk, against torch's cross_entropy on whole logits in fp64."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from lora_megatron.layers import smoothing, vocabulary_loss
from lora_megatron.layers.output_products import PlainOutputProducts
from lora_megatron.layers.smoothing import NO_SMOOTHING, Smoothing
from lora_megatron.layers.vocabulary_loss import (
    FEWEST_TOKENS,
    loss_of_hidden,
    loss_of_logits,
    tokens_per_chunk,
)
from lora_megatron.layers.vocabulary_shard import VocabularyShard
from tests.pool import Pool

SEQUENCE, SAMPLES, WIDTH, VOCABULARY, PADDED = 40, 5, 16, 90, 128  # on four ranks one has padding alone
TOKENS = SEQUENCE * SAMPLES
LIMITS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [s, b, h], weight [V, h], labels [s, b] with both ends of every shard, weights of the tokens [s, b]."""
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(SEQUENCE, SAMPLES, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(PADDED, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, VOCABULARY, (SEQUENCE, SAMPLES), generator=generator)
    labels.view(-1)[:8] = torch.tensor([0, 31, 32, 63, 64, 88, 89, 89])
    return hidden, weight, labels, torch.rand(SEQUENCE, SAMPLES, generator=generator).round(decimals=1)


def whole(dtype: torch.dtype, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, d hidden, d weight) by torch, in fp64, from the same rounded inputs."""
    hidden, weight, labels, weights = case(dtype)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = (hidden @ weight[:VOCABULARY].t()).flatten(0, 1)
    losses = functional.cross_entropy(logits, labels.flatten(), reduction="none", label_smoothing=share)
    losses = losses.view(labels.shape)
    (losses * weights).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return losses.detach(), hidden.grad, weight.grad


def shard_of_rank(sequence_parallel: bool) -> VocabularyShard:
    rank, size = dist.get_rank(), dist.get_world_size()
    columns = PADDED // size
    real = max(0, min(columns, VOCABULARY - rank * columns))
    return VocabularyShard(rank * columns, real, dist.group.WORLD if size > 1 else None, sequence_parallel)


def errors(dtype: torch.dtype, sequence_parallel: bool, trained: bool, share: float = 0.0) -> list[float]:
    """Relative error, to the largest value, of the losses and each gradient on this rank; in chunks of 64 tokens."""
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden, weight, labels, weights = case(dtype)
    shard, smoothing = shard_of_rank(sequence_parallel), Smoothing(share, VOCABULARY)
    rows = slice(shard.first, shard.first + PADDED // size)
    own = slice(rank * SEQUENCE // size, (rank + 1) * SEQUENCE // size) if sequence_parallel else slice(None)
    hidden, weight = hidden[own].clone().requires_grad_(), weight[rows].clone().requires_grad_(trained)
    losses_want, hidden_want, weight_want = whole(dtype, share)
    with mock.patch.object(vocabulary_loss, "CHUNK_BYTES", 0):
        if trained:
            logits = hidden @ weight.t()
            logits.detach()[..., shard.real :] = torch.finfo(dtype).min
            losses = loss_of_logits(logits, labels, shard, smoothing=smoothing)
        else:
            losses = loss_of_hidden(hidden, PlainOutputProducts(weight), labels, shard, smoothing=smoothing)
        (losses * weights).sum().backward()
    assert hidden.grad is not None
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    pairs = [(losses.detach(), losses_want)]
    if trained:  # the sum of dx over ranks is the output layer's
        assert weight.grad is not None
        pairs.append((weight.grad, weight_want[rows]))
    else:
        pairs.append((hidden.grad, hidden_want[own]))
    return [float((got - want).abs().max() / want.abs().max().clamp(min=1e-3)) for got, want in pairs]


def all_errors(world: int, share: float) -> list[tuple[str, list[float], float]]:
    found = []
    for dtype, limit in LIMITS.items():
        for sequence_parallel, trained in [(False, False), (False, True), *([(True, False)] if world > 1 else [])]:
            what = f"{dtype}, sequence parallel {sequence_parallel}, trained {trained}"
            found.append((what, errors(dtype, sequence_parallel, trained, share), limit))
    return found


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9], ids=lambda share: f"smoothing-{share}")
@pytest.mark.parametrize("world", [1, 2, 4])
def test_losses_and_gradients_are_those_of_whole_logits(pool: Pool, world: int, share: float) -> None:
    for rank, found in enumerate(pool.run(world, all_errors, world=world, share=share)):
        for what, relative, limit in found:
            assert max(relative) < limit, f"rank {rank}, {what}: {relative}"


def errors_of_a_partial_gradient(sequence_parallel: bool) -> float:
    def own_columns_only(shard: VocabularyShard, partial: Tensor, out: Tensor) -> None:
        out.copy_(partial[: len(out)])

    with mock.patch.object(VocabularyShard, "sum_over_ranks", own_columns_only):
        return errors(torch.float32, sequence_parallel, False)[1]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_comparison_catches_a_sum_left_out(pool: Pool, sequence_parallel: bool) -> None:
    assert min(pool.run(2, errors_of_a_partial_gradient, sequence_parallel=sequence_parallel)) > 0.1


def errors_of_padding_in_the_mean(trained: bool) -> list[float]:
    """Smoothing that takes every column of the rank for a token."""
    original = smoothing.Labels.subtract_smoothed

    def subtract(self: Any, p: Tensor, weight: Any, real: int, share: Smoothing) -> Tensor:
        return original(self, p, weight, p.shape[1], share)

    with mock.patch.object(smoothing.Labels, "subtract_smoothed", subtract):
        return errors(torch.float32, False, trained, 0.1)


@pytest.mark.parametrize("trained", [False, True])
def test_the_comparison_catches_padding_in_the_mean(pool: Pool, trained: bool) -> None:
    found = pool.run(2, errors_of_padding_in_the_mean, trained=trained)
    assert max(max(error) for error in found) > 1e-3
    right = pool.run(2, errors, dtype=torch.float32, sequence_parallel=False, trained=trained, share=0.1)
    assert max(max(error) for error in right) < LIMITS[torch.float32]


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation made new, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                elements = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements[tensor.dtype] = max(elements, self.elements.get(tensor.dtype, 0))
        return result


ONE = VocabularyShard(0, VOCABULARY)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("smoothed", [NO_SMOOTHING, Smoothing(0.1, VOCABULARY)], ids=["plain", "smoothed"])
def test_no_fp32_logits_of_all_tokens_are_ever_made(smoothed: Smoothing, trained: bool, needs_gradient: bool) -> None:
    hidden, weight, labels, _ = case(torch.bfloat16)
    hidden.requires_grad_(needs_gradient)
    logits = hidden @ weight.t()
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with mock.patch.object(vocabulary_loss, "CHUNK_BYTES", 0), Largest() as largest:
        with hooks:
            losses = (
                loss_of_logits(logits, labels, ONE, smoothing=smoothed)
                if trained
                else loss_of_hidden(hidden, PlainOutputProducts(weight), labels, ONE, smoothing=smoothed)
            )
        if needs_gradient:
            losses.sum().backward(inputs=[logits if trained else hidden])
    assert 0 < largest.elements[torch.float32] <= FEWEST_TOKENS * PADDED
    if not trained:
        assert largest.elements[torch.bfloat16] <= FEWEST_TOKENS * PADDED
    kept_bytes = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    in_full = 2 * TOKENS * PADDED + (8 + 4 + 4) * TOKENS if trained else 2 * TOKENS * WIDTH
    assert kept_bytes == (in_full if needs_gradient else 0)


def test_a_second_backward_pass_is_refused() -> None:
    """The first one consumed what it needs in place."""
    hidden, weight, labels, _ = case(torch.float32)
    losses = loss_of_hidden(hidden.requires_grad_(), PlainOutputProducts(weight), labels, ONE).sum()
    losses.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.backward()


def test_chunks_are_even_and_bounded() -> None:
    assert tokens_per_chunk(2048, 50304) == 1024, "GPT-3's logits, in two halves"
    assert tokens_per_chunk(16, 50304) == 16
    assert tokens_per_chunk(1000, 10**9) == 63, "sixteen equal chunks"

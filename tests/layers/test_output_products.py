# SPDX-License-Identifier: Apache-2.0
"""The output layer's products in FP8: losses and gradients against fp64, on tensor ranks, and on a GPU.

Bounds are of e4m3, whose rounding of a normally distributed matrix is 2.6%: a logit is off by sqrt(2) of that of what
it is the sum of, and a row of W, as a label has it in dx, by 2.6% itself. Rounding p to FP8 may add less than 1%.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from lora_megatron.layers import vocabulary_loss
from lora_megatron.layers.output_products import Fp8OutputProducts, OutputProducts, PlainOutputProducts
from lora_megatron.layers.smoothing import NO_SMOOTHING, Labels, Smoothing
from lora_megatron.layers.storage.fp8 import StoredFp8
from lora_megatron.layers.vocabulary_loss import loss_of_hidden
from lora_megatron.layers.vocabulary_shard import VocabularyShard
from tests.pool import Pool

VOCABULARY, PADDED, WIDTH, TOKENS = 16000, 16128, 256, 64
ROUNDING_OF_DZ, ALL_OF_DX, LOGIT = 0.01, 0.035, 0.045
"""Relative errors at most: dx by rounding dz; dx for given logits; logits, to their spread. Measured 0.6% and 3.0%."""


def table(rows: int = PADDED, width: int = WIDTH) -> Tensor:
    """W [V, h] in bf16: rows of different norms that share a direction, as trained ones do; padding at the end."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(rows, width, generator=generator) * (0.7 + 0.6 * torch.rand(rows, 1, generator=generator))
    return (0.02 * (weight + torch.randn(width, generator=generator) / 2)).bfloat16()


def stored_fp8(weight: Tensor, group: dist.ProcessGroup | None = None) -> StoredFp8:
    stored = StoredFp8(*weight.shape, axis=0, group=group, device=weight.device)
    stored.transposes = 0
    stored.store(weight)
    return stored


def distributions() -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, logits [n, V] in fp64, labels [n]), from flat to sure of a token."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(TOKENS, VOCABULARY, generator=generator, dtype=torch.float64)
    any_label = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    rank = torch.arange(1, VOCABULARY + 1, dtype=torch.float64)[torch.randperm(VOCABULARY, generator=generator)]
    zipf, steep = noise - 1.1 * rank.log(), 2 * noise - 1.76 * rank.log()
    yield "flat", 0.3 * noise, any_label
    for name, logits in (("Zipf's law", zipf), ("steep", steep)):
        yield name, logits, torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    for sure, name in ((5.0, "99.3%"), (9.0, "99.99%")):
        peaked = steep.scatter(1, any_label[:, None], steep.logsumexp(1, keepdim=True) + sure)
        yield f"sure of the label at {name}", peaked, any_label
    yield "sure of another token", peaked, any_label.roll(1)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


class Error(NamedTuple):
    of_rounding_dz: float
    of_dx: float


def gradient_error(
    logits: Tensor, labels: Tensor, products: OutputProducts, stored: StoredFp8, weight: Tensor
) -> Error:
    dz = torch.zeros(TOKENS, PADDED, dtype=torch.float64)
    dz[:, :VOCABULARY] = logits.softmax(1)
    dz.scatter_add_(1, labels[:, None], torch.full((TOKENS, 1), -1.0, dtype=torch.float64))
    got = products.hidden_gradient(dz.bfloat16(), Labels.of(labels, 0, PADDED, torch.float32))
    quantised = stored.unpacked(torch.float32)
    return Error(relative(got, dz @ quantised.double()), relative(got, dz @ weight.double()))


class LabelWithTheOthers(Fp8OutputProducts):
    """dz rounded as it is."""

    def hidden_gradient(self, dz: Tensor, labels: Labels) -> Tensor:
        return self.stored.input_gradient(dz)


class LabelSubtractedAfterwards(Fp8OutputProducts):
    """p rounded as it is, and the label's row subtracted."""

    def hidden_gradient(self, dz: Tensor, labels: Labels) -> Tensor:
        p = dz.scatter_add(1, labels.column, torch.ones_like(dz[:, :1]))
        return self.stored.input_gradient(p) - self.stored.rows(labels.column.squeeze(1)).to(dz.dtype)


def errors_of(kind: type[Fp8OutputProducts]) -> dict[str, Error]:
    weight = table()
    stored = stored_fp8(weight)
    found = {name: gradient_error(*case, kind(stored), stored, weight) for name, *case in distributions()}
    for name, error in found.items():
        print(f"{kind.__name__}, {name}: rounding dz {error.of_rounding_dz:.2%}, dx {error.of_dx:.2%}")
    return found


def test_the_gradient_of_hidden_states_is_as_exact_as_the_rows_of_the_weight() -> None:
    for name, error in errors_of(Fp8OutputProducts).items():
        assert error.of_rounding_dz < ROUNDING_OF_DZ, name
        assert error.of_dx < ALL_OF_DX, name


@pytest.mark.parametrize("kind", [LabelWithTheOthers, LabelSubtractedAfterwards])
def test_the_bound_notices_a_label_that_is_not_apart(kind: type[Fp8OutputProducts]) -> None:
    assert max(error.of_rounding_dz for error in errors_of(kind).values()) > 1.5 * ROUNDING_OF_DZ


def hidden_and_labels(weight: Tensor, vocabulary: int = VOCABULARY, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Hidden states [s, 1, h] in bf16 that give logits of spread 2; half of them 12 more at their labels [s, 1]."""
    generator, width = torch.Generator().manual_seed(3), weight.shape[1]
    labels = torch.randint(0, vocabulary, (tokens, 1), generator=generator)
    labels[:4, 0] = torch.tensor([0, vocabulary // 2 - 1, vocabulary // 2, vocabulary - 1])
    hidden = torch.randn(tokens, 1, width, generator=generator) * (2 / (0.02 * width**0.5))
    rows = weight.float()[labels[1::2]]
    hidden[1::2] += 12 * rows / rows.square().sum(2, keepdim=True)
    return hidden.bfloat16(), labels


class Found(NamedTuple):
    losses: Tensor
    dx: Tensor


def train(
    products: OutputProducts, hidden: Tensor, labels: Tensor, shard: VocabularyShard, smoothing: Smoothing
) -> Found:
    hidden = hidden.clone().requires_grad_()
    with mock.patch.object(vocabulary_loss, "CHUNK_BYTES", 4 * 40 * PADDED):
        losses = loss_of_hidden(hidden, products, labels, shard, smoothing=smoothing)
        losses.mean().backward()
    assert hidden.grad is not None
    return Found(losses.detach().cpu(), hidden.grad.cpu())


def in_fp64(hidden: Tensor, labels: Tensor, weight: Tensor, smoothing: Smoothing) -> Found:
    hidden = hidden.double().requires_grad_()
    logits = (hidden @ weight[:VOCABULARY].double().t()).flatten(0, 1)
    losses = functional.cross_entropy(logits, labels.flatten(), reduction="none", label_smoothing=smoothing.share)
    losses.mean().backward()
    assert hidden.grad is not None
    return Found(losses.detach().view(labels.shape), hidden.grad)


AGREED = 1e-4
SMOOTHINGS = {"plain": NO_SMOOTHING, "smoothed": Smoothing(0.1, VOCABULARY)}


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_losses_and_gradients_from_hidden_states(smoothing: str) -> None:
    weight, share = table(), SMOOTHINGS[smoothing]
    hidden, labels = hidden_and_labels(weight)
    shard = VocabularyShard(0, VOCABULARY)
    want = in_fp64(hidden, labels, weight, share)
    plain = train(PlainOutputProducts(weight), hidden, labels, shard, share)
    got = train(Fp8OutputProducts(stored_fp8(weight)), hidden, labels, shard, share)
    logits = hidden.double().flatten(0, 1) @ weight[:VOCABULARY].double().t()
    spread = float(logits.std())
    error = (got.losses - want.losses).double()
    print(
        f"spread of logits {spread:.2f}; losses off by {float(error.square().mean().sqrt()):.4f}, their mean "
        f"{float(want.losses.mean()):.3f} by {float(error.mean()):+.4f} (bf16 "
        f"{float((plain.losses - want.losses).mean()):+.4f}); dx by {relative(got.dx, want.dx):.2%} (bf16 "
        f"{relative(plain.dx, want.dx):.2%})"
    )
    assert float(error.square().mean().sqrt()) < LOGIT * spread
    assert abs(float(error.mean())) < 0.02
    assert relative(got.dx, want.dx) < 0.05
    assert relative(plain.dx, want.dx) < 0.01


def on_ranks(sequence_parallel: bool) -> list[tuple[Tensor, Tensor]]:
    """This rank's losses and dx with each smoothing; hidden states in fp32, so that sums over ranks round little."""
    rank, size = dist.get_rank(), dist.get_world_size()
    columns, group = PADDED // size, dist.group.WORLD if size > 1 else None
    shard = VocabularyShard(rank * columns, min(columns, VOCABULARY - rank * columns), group, sequence_parallel)
    hidden, labels = hidden_and_labels(table())
    own = slice(rank * TOKENS // size, (rank + 1) * TOKENS // size) if sequence_parallel else slice(None)
    weight = table()[shard.first : shard.first + columns]
    products = Fp8OutputProducts(stored_fp8(weight, group))
    return [tuple(train(products, hidden[own].float(), labels, shard, share)) for share in SMOOTHINGS.values()]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_results_do_not_depend_on_how_the_vocabulary_is_cut(pool: Pool, sequence_parallel: bool) -> None:
    (want,) = pool.run(1, on_ranks, sequence_parallel=False)
    found = pool.run(2, on_ranks, sequence_parallel=sequence_parallel)
    for index, (losses, dx) in enumerate(want):
        for ranks in found:
            assert relative(ranks[index][0], losses) < 1e-6
        parts = [ranks[index][1] for ranks in found]
        print(f"losses move by {max(relative(ranks[index][0], losses) for ranks in found):.2e}")
        whole = [torch.cat(parts)] if sequence_parallel else parts
        print(f"dx moves by {max(relative(one, dx) for one in whole):.2e}")
        # A p between two codes may fall either way.
        assert max(relative(one, dx) for one in whole) < AGREED


def test_a_scale_that_is_not_agreed_is_noticed(pool: Pool) -> None:
    """Without the agreement over ranks each rounds p to a scale of its own: dx moves with the cut."""
    (want,) = pool.run(1, on_ranks, sequence_parallel=False)
    found = pool.run(2, without_agreement)
    moved = max(relative(ranks[0][1], want[0][1]) for ranks in found)
    print(f"dx moves by {moved:.2e}")
    assert moved > 4 * AGREED


def without_agreement() -> list[tuple[Tensor, Tensor]]:
    with mock.patch.object(StoredFp8, "backward_group", None):
        return on_ranks(sequence_parallel=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that multiplies FP8")
@pytest.mark.parametrize(("tokens", "width", "rows"), [(512, 1024, 2048), (512, 1024, 50304)])
@pytest.mark.parametrize("share", [0.0, 0.1], ids=["plain", "smoothed"])
def test_a_gpu_computes_what_the_fallback_does(tokens: int, width: int, rows: int, share: float) -> None:
    """The same codes but for values between two of them; products in fp32, or, of logits, in shorter registers."""
    vocabulary = rows - 47
    weight = table(rows, width)
    hidden, labels = hidden_and_labels(weight, vocabulary, tokens)
    shard, smoothing = VocabularyShard(0, vocabulary), Smoothing(share, vocabulary) if share else NO_SMOOTHING
    want = train(Fp8OutputProducts(stored_fp8(weight)), hidden, labels, shard, smoothing)
    products = Fp8OutputProducts(stored_fp8(weight.cuda()))
    got = train(products, hidden.cuda(), labels.cuda(), shard, smoothing)
    print(
        f"[{tokens}, {width}] x [{rows}, {width}]: losses off by {relative(got.losses, want.losses):.2e}, dx by "
        f"{relative(got.dx, want.dx):.2e}"
    )
    assert relative(got.losses, want.losses) < 5e-3
    assert relative(got.dx, want.dx) < 2e-2
    again = train(products, hidden.cuda(), labels.cuda(), shard, smoothing)
    assert relative(again.losses, got.losses) < 1e-6, "with what was turned round the first time"
    assert relative(again.dx, got.dx) < 1e-6

# SPDX-License-Identifier: Apache-2.0
"""The loss over a cut vocabulary by Triton's kernels, against plain algebra in fp64 and against the way without them.

On a GPU, or in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lora_megatron.layers import vocabulary_loss
from lora_megatron.layers.output_products import OutputProducts
from lora_megatron.layers.smoothing import Labels, Smoothing
from lora_megatron.layers.vocabulary_loss import FEWEST_TOKENS, loss_of_hidden, loss_of_logits
from lora_megatron.layers.vocabulary_shard import VocabularyShard
from tests.layers.test_low_rank_input_kernels import DEVICE, HAS_GPU, by_kernel, interpreted, large, random

TYPES = [pytest.param(torch.float32, 2e-6, id="fp32"), pytest.param(torch.bfloat16, 4e-3, id="bf16")]
"""And the most that a gradient may be off by, to its own size: what rounding it once does."""
SHAPES = [  # tokens, columns, of which real
    *(
        pytest.param(*shape, marks=by_kernel, id="{}x{}-{}".format(*shape))
        for shape in ((5, 90, 90), (3, 515, 515), (70, 128, 90), (2, 1, 1), (3, 4096, 4096), (2, 9001, 8190))
    ),
    pytest.param(1100, 50304, 50257, marks=large, id="GPT-3"),
    pytest.param(1100, 25152, 25152, marks=large, id="GPT-3, halved"),
]
every_shape = pytest.mark.parametrize(("tokens", "columns", "real"), SHAPES)
every_type = pytest.mark.parametrize(("dtype", "bound"), TYPES)
small = pytest.mark.parametrize("tokens", [pytest.param(70, marks=by_kernel, id="small")])


@pytest.fixture(autouse=True)
def kernels() -> Iterator[Any]:
    """With Triton's interpreter in the place of a GPU that is not there."""
    anywhere = vocabulary_loss._kernels_are_for
    with contextlib.ExitStack() as patches:
        for patch in () if HAS_GPU else [*interpreted(), mock.patch.object(vocabulary_loss, "_by_kernel", anywhere)]:
            patches.enter_context(patch)
        yield vocabulary_loss.kernels


class Itself(OutputProducts):
    """An output layer whose logits are its input, so that the gradient of each is seen, whatever padding holds."""

    def __init__(self, columns: int) -> None:
        self._columns = columns

    @property
    def columns(self) -> int:
        return self._columns

    def logits(self, x: Tensor, out: Tensor) -> None:
        out.copy_(x)

    def hidden_gradient(self, dz: Tensor, labels: Labels) -> Tensor:
        return dz.clone()


class Problem:
    """Logits [n, columns] of one rank of one, padding that is larger than any of them, labels and tokens' weights."""

    def __init__(self, tokens: int, columns: int, real: int, dtype: torch.dtype) -> None:
        self.logits = 4 * random(tokens, columns, seed=1, dtype=dtype)
        self.logits[:, real:] = 1e4
        self.labels = (random(tokens, seed=2, dtype=torch.float64).abs() * 1e6).long() % real
        self.labels[-1], self.labels[0] = real - 1, 0
        self.weights = random(tokens, seed=3, dtype=torch.float32)
        self.shard, self.real = VocabularyShard(0, real), real

    def found(self, *, trained: bool, smoothing: Smoothing | None = None) -> tuple[Tensor, Tensor]:
        """Losses and dL/dz; the weights' are in it only where the gradient is of all tokens at once."""
        leaf = self.logits.clone().requires_grad_()
        options = {} if smoothing is None else {"smoothing": smoothing}
        if trained:
            losses = loss_of_logits(leaf * 1, self.labels, self.shard, **options)
        else:
            losses = loss_of_hidden(leaf, Itself(leaf.shape[1]), self.labels, self.shard, **options)
        losses.backward(self.weights if trained else torch.ones_like(losses))
        assert leaf.grad is not None
        assert losses.dtype == torch.promote_types(leaf.dtype, torch.float32)
        assert leaf.grad.dtype == leaf.dtype
        return losses.detach(), leaf.grad

    def wanted(self, *, trained: bool) -> tuple[Tensor, Tensor]:
        """By autograd in fp64."""
        leaf = self.logits.double().requires_grad_()
        losses = functional.cross_entropy(leaf[:, : self.real], self.labels, reduction="none")
        losses.backward(self.weights.double() if trained else torch.ones_like(losses))
        assert leaf.grad is not None
        return losses.detach(), leaf.grad

    def with_padding_at_the_minimum(self) -> Problem:
        """As whoever hands logits over to the way without kernels has it."""
        self.logits[:, self.real :] = torch.finfo(self.logits.dtype).min
        return self


def off(got: Tensor, want: Tensor) -> float:
    """The largest error, to the largest number."""
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def off_each(got: Tensor, want: Tensor) -> float:
    """The largest error to the number itself, of those that fp32 holds."""
    known = want.double().abs() > 1e-30
    return float(((got.double() - want.double()).abs() / want.double().abs())[known].max())


@every_shape
@every_type
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_losses_and_gradients_are_those_of_plain_algebra(
    trained: bool, dtype: torch.dtype, bound: float, tokens: int, columns: int, real: int
) -> None:
    """Whatever is in padded columns, whose gradient is none; in chunks; to the bit the same when it is done again."""
    problem = Problem(tokens, columns, real, dtype)
    with mock.patch.object(vocabulary_loss, "CHUNK_BYTES", 0):
        (losses, gradient), again = problem.found(trained=trained), problem.found(trained=trained)
    losses_want, gradient_want = problem.wanted(trained=trained)
    assert float((losses.double() - losses_want).abs().max()) < 1e-5
    assert real == 1 or off(gradient, gradient_want) < bound
    # A small probability too is right to its own size; at a label two numbers may cancel.
    others = torch.ones_like(gradient).scatter_(1, problem.labels[:, None], 0).bool()
    others[:, real:] = False
    assert real == 1 or off_each(gradient[others], gradient_want[others]) < max(bound, 1e-5)
    assert gradient[:, real:].count_nonzero() == 0
    assert torch.equal(losses, again[0])
    assert torch.equal(gradient, again[1])


@every_shape
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_it_is_the_way_without_kernels(trained: bool, tokens: int, columns: int, real: int) -> None:
    """Up to fp32's rounding; so in bf16 all but a few numbers are the same, and those are neighbours."""
    for dtype, apart in ((torch.float32, 2e-6), (torch.bfloat16, 2**-7)):
        problem = Problem(tokens, columns, real, dtype).with_padding_at_the_minimum()
        losses, gradient = problem.found(trained=trained)
        with mock.patch.object(vocabulary_loss, "_by_kernel", return_value=False):
            losses_want, gradient_want = problem.found(trained=trained)
        assert float((losses - losses_want).abs().max()) < 1e-5
        largest = float(problem.weights.abs().max()) if trained else 1.0
        assert float((gradient.double() - gradient_want.double()).abs().max()) <= apart * largest
        if dtype == torch.bfloat16:
            assert int((gradient != gradient_want).count_nonzero()) <= 2 + gradient.numel() // 500


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@small
def test_what_is_left_of_a_likely_label_is_rounded_once(tokens: int, trained: bool) -> None:
    """p - 1, of a p near 1 that bf16 would hold with fewer digits than their difference: bf16 is what the same logits
    give in fp32, rounded, but for the order of a sum."""
    problem, row = Problem(tokens, 90, 90, torch.bfloat16), torch.arange(tokens, device=DEVICE)
    problem.logits[row, problem.labels] = (problem.logits.float().logsumexp(1) + 2).bfloat16()
    _, gradient = problem.found(trained=trained)
    problem.logits = problem.logits.float()
    _, exact = problem.found(trained=trained)
    got, want = (each[row, problem.labels] for each in (gradient, exact))
    assert int((got != want.bfloat16()).count_nonzero()) <= 2
    weight = problem.weights if trained else 1.0
    twice = (((want / weight + 1).bfloat16() - 1) * weight).bfloat16()
    assert int((twice != want.bfloat16()).count_nonzero()) > tokens / 2, "a rounding on the way would be seen"


@pytest.mark.parametrize(("columns", "real"), [(64, 90), (96, 96), (48, 70)])
@small
@every_type
def test_ranks_together_are_one(dtype: torch.dtype, bound: float, tokens: int, columns: int, real: int) -> None:
    """Each finds its own numbers of its own columns; of the last rank some are padding, or all."""
    from lora_megatron.layers import vocabulary_loss_kernels as kernels  # needs Triton

    problem = Problem(tokens, 2 * columns, real, dtype)
    halves = problem.logits.split(columns, 1)
    parts = []
    for rank, half in enumerate(halves):
        labels = Labels.of(problem.labels, rank * columns, columns, torch.float32)
        own_real = max(0, min(columns, real - rank * columns))
        numbers = kernels.statistics(half.contiguous(), labels, own_real)
        here = labels.here.bool()
        assert all(number.dtype == torch.float32 and number.isfinite().all() for number in numbers)
        assert numbers[2][~here].count_nonzero() == 0
        assert torch.equal(numbers[2][here], half.float().gather(1, labels.column).squeeze(1)[here])
        parts.append((half, labels, own_real, numbers))
    maxima, totals, chosen = (torch.stack([numbers[i] for *_, numbers in parts]) for i in range(3))
    maximum = maxima.amax(0)
    total = (totals * (maxima - maximum).exp()).sum(0)
    losses_want, gradient_want = problem.wanted(trained=False)
    assert float((total.log() - (chosen.sum(0) - maximum) - losses_want).abs().max()) < 1e-5
    for rank, (half, labels, own_real, (own_maximum, own_total, own_chosen)) in enumerate(parts):
        softmax = vocabulary_loss._Softmax(own_chosen, own_maximum, maximum, total)
        written = half.contiguous()
        kernels.write_gradient(written, own_maximum, 1 / softmax.divisor, labels, labels.here, own_real)
        want = gradient_want[:, rank * columns :][:, :columns]
        assert float((written.double() - want).abs().max()) < bound
        assert written[:, own_real:].count_nonzero() == 0
        if own_real == 0:
            assert own_total.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@small
def test_a_rank_without_a_token_has_no_say(tokens: int, dtype: torch.dtype) -> None:
    """As on the way without kernels, in what it sends and in what it makes of what it gets."""
    from lora_megatron.layers import vocabulary_loss_kernels as kernels  # needs Triton

    logits, labels = random(tokens, 40, seed=1, dtype=dtype), torch.arange(tokens, device=DEVICE)
    where = Labels.of(labels, 1000, 40, torch.float32)
    own_maximum, own_total, chosen = kernels.statistics(logits, where, 0)
    others = torch.full_like(own_maximum, 7.0)
    assert ((own_maximum - others).exp() * own_total + 3).eq(3).all()
    assert chosen.count_nonzero() == 0
    softmax = vocabulary_loss._Softmax(chosen, own_maximum, others, 3 * torch.ones_like(others))
    assert softmax.divisor.isinf().all()
    vocabulary_loss._write_gradient(logits, None, softmax, where, 0, vocabulary_loss.NO_SMOOTHING)
    assert logits.count_nonzero() == 0


@small
def test_a_rank_whose_tokens_have_no_chance_has_no_gradient(tokens: int) -> None:
    """exp(z - own maximum) is 1 somewhere on every rank; the divisor is infinite."""
    from lora_megatron.layers import vocabulary_loss_kernels as kernels  # needs Triton

    logits, where = (
        random(tokens, 40, seed=1, dtype=torch.float32),
        Labels.of(torch.arange(tokens), 1000, 40, torch.float32),
    )
    where = Labels(where.here.to(DEVICE), where.column.to(DEVICE))
    own_maximum, own_total, chosen = kernels.statistics(logits, where, 40)
    softmax = vocabulary_loss._Softmax(chosen, own_maximum, own_maximum + 200, own_total)
    vocabulary_loss._write_gradient(logits, None, softmax, where, 40, vocabulary_loss.NO_SMOOTHING)
    assert logits.count_nonzero() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [3, 50, 4500])
@small
def test_a_logit_that_is_no_number_is_seen_in_the_loss(tokens: int, column: int, value: float) -> None:
    problem = Problem(tokens, 5000, 4990, torch.bfloat16)
    problem.logits[1, column] = value
    losses, _ = problem.found(trained=False)
    assert losses.isfinite().tolist() == [row != 1 for row in range(tokens)]


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@small
def test_kernels_are_used_but_for_smoothing_and_fp64(tokens: int, trained: bool) -> None:
    problem = Problem(tokens, 90, 90, torch.bfloat16)
    with (
        mock.patch.object(vocabulary_loss, "CHUNK_BYTES", 0),
        mock.patch.object(
            vocabulary_loss.kernels, "statistics", side_effect=vocabulary_loss.kernels.statistics
        ) as first,
        mock.patch.object(
            vocabulary_loss.kernels, "write_gradient", side_effect=vocabulary_loss.kernels.write_gradient
        ) as second,
    ):
        problem.found(trained=trained, smoothing=Smoothing(0.1, 90))
        problem.logits = problem.logits.double()
        problem.found(trained=trained)
        assert (first.call_count, second.call_count) == (0, 0)
        problem.logits = problem.logits.float()
        problem.found(trained=trained)
    chunks = -(-tokens // FEWEST_TOKENS)
    assert chunks == 2
    assert (first.call_count, second.call_count) == (chunks, 1 if trained else chunks)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@small
def test_a_second_backward_pass_is_refused(tokens: int, trained: bool) -> None:
    """The first one consumed what it needs in place, of which a kernel tells autograd nothing by itself."""
    problem = Problem(tokens, 90, 90, torch.float32)
    leaf = problem.logits.clone().requires_grad_()
    if trained:
        losses = loss_of_logits(leaf * 1, problem.labels, problem.shard)
    else:
        losses = loss_of_hidden(leaf, Itself(90), problem.labels, problem.shard)
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()

# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy over a vocabulary cut over the tensor-parallel group, a chunk of tokens at a time.

    z = x W^T                                     x [n, h], W [V/t, h]: this rank's columns, padded ones at the minimum
    loss = log sum_v exp(z_v - m) - (z_label - m) m = max_v z_v over all ranks
    dloss/dz = p - 1[v = label],  p_v = exp(z_v - m) / sum
    dloss/dx = dloss/dz W                         summed over ranks, each of which has its columns only

Both products of a frozen W, in training precision or in FP8, are those of `layers.output_products`. With label
smoothing the target is no longer one label: see `layers.smoothing`.

Tokens are independent, so nothing as large as [tokens, V/t] is needed in fp32. Where W is frozen no logits are kept
either: dloss/dx of each token, for a loss of weight 1, is computed while its logits are there, and the backward pass
multiplies it by the weight that the token turned out to have. Where W trains, dW needs dloss/dz of all tokens at once:
the logits are kept in their own precision and overwritten by it.

Logits are rounded to the precision of W, what follows is in fp32, and dloss/dz is rounded once, as in megatron-core.
Ranks exchange three numbers a token (own maximum, own sum, own part of the target's logit) in one collective.
Without smoothing, on a GPU with Triton, kernels read logits once for these numbers and once for the gradient, and none
are in fp32 (`vocabulary_loss_kernels`). What is done here without them is what they are held to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lora_megatron.layers.output_products import OutputProducts
from lora_megatron.layers.smoothing import NO_SMOOTHING, Labels, Smoothing
from lora_megatron.layers.vocabulary_shard import VocabularyShard

try:
    from lora_megatron.layers import vocabulary_loss_kernels as kernels
except ImportError:  # no Triton: the same numbers, from more passes
    kernels = None  # type: ignore[assignment]  # mypy takes the name for a module; None is what is asked for below

CHUNK_BYTES = 256 * 2**20
"""Most bytes that a chunk's logits have, or would have, in fp32: small beside a model, and with GPT-3's 50,304 columns
still 1,334 tokens, enough rows for a product at full speed."""
FEWEST_TOKENS = 64
"""Of a chunk, however large the vocabulary: below, the product would read W for too few rows."""


def tokens_per_chunk(tokens: int, columns: int) -> int:
    """The size of the equal chunks (the last may be smaller) that `tokens` rows of `columns` logits are cut into."""
    most = max(CHUNK_BYTES // (4 * columns), FEWEST_TOKENS)
    return -(-tokens // -(-tokens // most))


def _by_kernel(like: Tensor, smoothing: Smoothing) -> bool:
    return kernels is not None and like.is_cuda and _kernels_are_for(like, smoothing)


def _kernels_are_for(like: Tensor, smoothing: Smoothing) -> bool:
    return like.dtype != torch.float64 and not smoothing.share


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _exponentials(logits: Tensor, maximum: Tensor, scratch: Tensor | None) -> Tensor:
    """exp(z - m) in fp32: in `scratch`, or in place of logits that are in fp32 already."""
    return torch.sub(logits, maximum.unsqueeze(1), out=logits if scratch is None else scratch).exp_()


def _scratch(rows: int, like: Tensor) -> Tensor | None:
    """Room for `rows` rows of `like`'s width in fp32; none is needed for logits that are."""
    wide = _wide(like.dtype)
    return None if like.dtype == wide else like.new_empty(rows, like.shape[1], dtype=wide)


@dataclass(frozen=True)
class _Softmax:
    """The loss of a chunk and what its gradient is made of; [n] each, the same on every rank but for `own_maximum`."""

    loss: Tensor
    own_maximum: Tensor
    maximum: Tensor
    total: Tensor

    @classmethod
    def of(cls, own_maximum: Tensor, own_total: Tensor, chosen: Tensor, shard: VocabularyShard) -> _Softmax:
        maximum, total = own_maximum, own_total
        if shard.group is not None:
            own = torch.stack([own_maximum, own_total, chosen])
            everyone = own.new_empty(shard.size, *own.shape)
            dist.all_gather_into_tensor(everyone.view(-1), own.view(-1), group=shard.group)
            maximum = everyone[:, 0].amax(0)
            total = (everyone[:, 1] * (everyone[:, 0] - maximum).exp_()).sum(0)
            chosen = everyone[:, 2].sum(0)
        return cls(total.log() - (chosen - maximum), own_maximum, maximum, total)

    @property
    def divisor(self) -> Tensor:
        """[n]: p = exp(z - own maximum) / divisor; infinite where this rank's columns have no chance."""
        return self.total * (self.maximum - self.own_maximum).exp_()


def _softmax_of(
    logits: Tensor, labels: Labels, shard: VocabularyShard, smoothing: Smoothing, scratch: Tensor | None
) -> tuple[_Softmax, Tensor | None]:
    """Of logits [n, V/t]; and, unless a kernel is to compute them again, exp(z - own maximum) as `_exponentials`."""
    if _by_kernel(logits, smoothing):
        return _Softmax.of(*kernels.statistics(logits, labels, shard.real), shard), None
    own_maximum, chosen = logits.amax(1).to(labels.here.dtype), labels.logit(logits, shard.real, smoothing)
    exps = _exponentials(logits, own_maximum, scratch)
    return _Softmax.of(own_maximum, exps.sum(1), chosen, shard), exps


def _write_gradient(
    logits: Tensor, exps: Tensor | None, softmax: _Softmax, labels: Labels, real: int, smoothing: Smoothing
) -> None:
    """p - target over the logits, from what `_softmax_of` returned; `exps` may be the logits."""
    divisor = softmax.divisor
    if exps is None:
        kernels.write_gradient(logits, softmax.own_maximum, divisor.reciprocal(), labels, labels.here, real)
    elif smoothing.share:
        logits.copy_(labels.subtract_smoothed(exps.div_(divisor.unsqueeze(1)), 1.0, real, smoothing))
    else:
        at_label = exps.gather(1, labels.column) / divisor.unsqueeze(1) - labels.here.unsqueeze(1)
        torch.div(exps, divisor.unsqueeze(1), out=logits)
        logits.scatter_(1, labels.column, at_label.to(logits.dtype))


class _LossOfHidden(torch.autograd.Function):
    """Frozen weight: hidden [parts of] tokens x h, labels of all tokens -> losses of all tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        products: OutputProducts,
        labels: Tensor,
        shard: VocabularyShard,
        smoothing: Smoothing,
        needs_gradient: bool,
    ) -> Tensor:
        ctx.shard = shard
        columns, wide, by_kernel = products.columns, _wide(hidden.dtype), _by_kernel(hidden, smoothing)
        labels = labels.view(shard.parts, -1)  # a sequence shard's tokens lie together
        losses = torch.empty(labels.shape, dtype=wide, device=labels.device)
        gradient = torch.empty_like(hidden) if needs_gradient else None
        size = max(tokens_per_chunk(labels.numel(), columns) // shard.parts, 1)
        logits = scratch = None
        for rows in _slices(hidden.shape[0], size):
            x = shard.gather_tokens(hidden[rows])
            if logits is None or len(logits) != len(x):
                logits = x.new_empty(len(x), columns)
                scratch = None if by_kernel else _scratch(len(x), logits)
            products.logits(x, logits)
            if not by_kernel:
                logits[:, shard.real :] = torch.finfo(logits.dtype).min
            where = Labels.of(labels[:, rows].reshape(-1), shard.first, columns, wide)
            softmax, exps = _softmax_of(logits, where, shard, smoothing, scratch)
            losses[:, rows] = softmax.loss.view(shard.parts, -1)
            if gradient is not None:
                _write_gradient(logits, exps, softmax, where, shard.real, smoothing)
                shard.sum_over_ranks(products.hidden_gradient(logits, where), gradient[rows])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses.view(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        shard: VocabularyShard = ctx.shard
        rank = shard.group.rank() if shard.group is not None and shard.sequence_parallel else 0
        own = grads[0].view(shard.parts, -1)[rank]
        # In place: nobody else holds it, and autograd refuses a second backward pass over it.
        return gradient.detach().mul_(own.unsqueeze(1)), None, None, None, None, None


class _LossOfLogits(torch.autograd.Function):
    """Trained weight: logits tokens x V/t, labels -> losses; the backward pass overwrites the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, shard: VocabularyShard, smoothing: Smoothing) -> Tensor:
        (tokens, columns), wide = logits.shape, _wide(logits.dtype)
        losses, maximum, total = (torch.empty(tokens, dtype=wide, device=logits.device) for _ in range(3))
        size = tokens_per_chunk(tokens, columns)
        scratch = logits.new_empty(0 if _by_kernel(logits, smoothing) else size, columns, dtype=wide)
        for rows in _slices(tokens, size):
            z, own = logits[rows], Labels.of(labels[rows], shard.first, columns, wide)
            softmax, _ = _softmax_of(z, own, shard, smoothing, scratch[: len(z)])
            losses[rows], maximum[rows], total[rows] = softmax.loss, softmax.maximum, softmax.total
        ctx.shard, ctx.smoothing = shard, smoothing
        ctx.save_for_backward(logits, labels, maximum, total)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        shard: VocabularyShard = ctx.shard
        smoothing: Smoothing = ctx.smoothing
        logits, labels, maximum, total = ctx.saved_tensors
        logits = logits.detach()
        tokens, columns = logits.shape
        weights = grads[0].to(total.dtype)  # of each token in the loss
        if _by_kernel(logits, smoothing):  # in one piece: chunks are for what is in fp32
            own = Labels.of(labels, shard.first, columns, total.dtype)
            kernels.write_gradient(logits, maximum, weights / total, own, own.here * weights, shard.real)
            torch.autograd.graph.increment_version(logits)  # a second backward pass is to be refused
            return logits, None, None, None
        size = tokens_per_chunk(tokens, columns)
        scratch = _scratch(size, logits)
        for rows in _slices(tokens, size):
            z, weight = logits[rows], weights[rows].unsqueeze(1)
            own = Labels.of(labels[rows], shard.first, columns, total.dtype)
            exps = _exponentials(z, maximum[rows], None if scratch is None else scratch[: len(z)])
            factor = weight / total[rows].unsqueeze(1)
            if smoothing.share:
                z.copy_(own.subtract_smoothed(exps.mul_(factor), weight, shard.real, smoothing))
                continue
            at_label = exps.gather(1, own.column) * factor - own.here.unsqueeze(1) * weight
            torch.mul(exps, factor, out=z)
            z.scatter_(1, own.column, at_label.to(z.dtype))
        return logits, None, None, None


def _slices(rows: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


def loss_of_hidden(
    hidden: Tensor,
    products: OutputProducts,
    labels: Tensor,
    shard: VocabularyShard,
    *,
    smoothing: Smoothing = NO_SMOOTHING,
) -> Tensor:
    """Loss of every token under a frozen output weight: hidden [s or s/t, b, h], products of W [V/t, h], labels [s, b]
    -> [s, b] in fp32. Where a gradient is asked for, one [s or s/t, b, h] is kept for it."""
    needs_gradient = torch.is_grad_enabled() and hidden.requires_grad
    flat = hidden.reshape(-1, hidden.shape[-1])
    losses: Tensor = _LossOfHidden.apply(flat, products, labels.reshape(-1), shard, smoothing, needs_gradient)
    return losses.view(labels.shape)


def loss_of_logits(
    logits: Tensor, labels: Tensor, shard: VocabularyShard, *, smoothing: Smoothing = NO_SMOOTHING
) -> Tensor:
    """Loss of every token: logits [s, b, V/t] with padded columns at the minimum, labels [s, b] -> [s, b] in fp32.

    The backward pass writes the gradient into `logits`, which nothing else may hold by then."""
    flat = logits.reshape(-1, logits.shape[-1]).contiguous()
    losses: Tensor = _LossOfLogits.apply(flat, labels.reshape(-1), shard, smoothing)
    return losses.view(labels.shape)

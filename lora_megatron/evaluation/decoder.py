# SPDX-License-Identifier: Apache-2.0
"""A sharded model that reads prompts once and then goes on token by token: TP, PP, VPP and SP, on a CPU or GPUs.

    with decoding(chunks, vocab_size=...) as decoder:
        picked = decoder.start(prompts, pick, shape)      # one pass over the prompts; [b, ...] of `pick`
        decoder.select(rows)                              # reorder, repeat, drop rows
        picked = decoder.advance(tokens, pick, shape)     # one pass over one token a row

`pick` sees whole logits [b, vocabulary] in fp32 on the last pipeline stage and makes of them the few numbers that the
search needs; those of one rank go to all ranks of the model, so that none can take another turn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_megatron.errors import NumericalError
from lora_megatron.layers.attention import SdpaAttention
from lora_megatron.layers.cache import LayerCache, Span
from lora_megatron.parallel.agree import device_for_collectives
from lora_megatron.parallel.heartbeat import beat

_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

Pick = Callable[[Tensor], Tensor]
"""Logits [b, vocabulary] -> numbers of a shape known beforehand; ids and fp32 scores alike fit into float64."""


class Decoder(Protocol):
    """What a search needs of a model. Every call is collective over the ranks of one copy of the model, and raises
    NumericalError on all of them where a logit is not finite."""

    def start(self, prompts: Sequence[Sequence[int]], pick: Pick, shape: tuple[int, ...]) -> Tensor:
        """Forget the batch before; read prompts (none empty) and pick from the logits of what follows each."""

    def advance(self, tokens: Sequence[int], pick: Pick, shape: tuple[int, ...]) -> Tensor:
        """Append one token to each row and pick from the logits of what follows."""

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows; a row may stand there several times, or not at all."""


@contextlib.contextmanager
def decoding(chunks: Sequence[GPTModel], *, vocab_size: int) -> Iterator[CachedDecoder]:
    """Within, the model is in evaluation mode and keeps keys and values; afterwards it is what it was.

    vocab_size: ids that may be chosen, those below it.

    Attention is not left to cuDNN, which builds a plan for every shape it meets: here each step has another one.
    """
    was_training = [chunk.training for chunk in chunks]
    decoder = CachedDecoder(chunks, vocab_size)
    try:
        for chunk in chunks:
            chunk.eval()
        with torch.no_grad(), sdpa_kernel(_ATTENTION):
            yield decoder
    finally:
        decoder.close()
        for chunk, training in zip(chunks, was_training, strict=True):
            chunk.train(training)


class CachedDecoder:
    """See the module; made by `decoding`."""

    def __init__(self, chunks: Sequence[GPTModel], vocab_size: int) -> None:
        config = chunks[0].config
        self._chunks, self._vocab_size = chunks, vocab_size
        self._hidden_size, self._dtype = config.hidden_size, config.params_dtype
        self._tensor_size = mpu.get_tensor_model_parallel_world_size()
        self._sequence = bool(config.sequence_parallel)
        self._multiple = self._tensor_size if self._sequence else 1  # positions that ranks can share out
        self._last_position = chunks[0].max_sequence_length - 1
        self._device = device_for_collectives()
        self._attentions = [m for chunk in chunks for m in chunk.modules() if isinstance(m, SdpaAttention)]
        self._lengths: list[int] = []
        self._span, self._ends = Span([0], 1, self._device), torch.zeros(1)
        self._handles = [handle for chunk in chunks for handle in self._hook(chunk)]

    def start(self, prompts: Sequence[Sequence[int]], pick: Pick, shape: tuple[int, ...]) -> Tensor:
        """See `Decoder`."""
        assert prompts
        assert all(prompts)
        for attention in self._attentions:
            attention.cache = LayerCache()
        self._lengths = [0] * len(prompts)
        return self._run(prompts, pick, shape)

    def advance(self, tokens: Sequence[int], pick: Pick, shape: tuple[int, ...]) -> Tensor:
        """See `Decoder`."""
        assert len(tokens) == len(self._lengths)
        return self._run([[token] for token in tokens], pick, shape)

    def select(self, rows: Sequence[int]) -> None:
        """See `Decoder`."""
        if list(rows) == list(range(len(self._lengths))):
            return
        chosen = torch.tensor(rows, device=self._device)
        for attention in self._attentions:
            assert attention.cache is not None
            attention.cache.select(chosen)
        self._lengths = [self._lengths[row] for row in rows]

    def close(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        for attention in self._attentions:
            attention.cache = None

    def _run(self, new: Sequence[Sequence[int]], pick: Pick, shape: tuple[int, ...]) -> Tensor:
        beat()
        width = -(-max(map(len, new)) // self._multiple) * self._multiple
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in new], device=self._device)
        self._span = Span(self._lengths, width, self._device)
        self._ends = torch.tensor([len(row) - 1 for row in new], device=self._device)
        for attention in self._attentions:
            assert attention.cache is not None
            attention.cache.span = self._span
        logits = self._forward(tokens)
        self._lengths = [old + len(row) for old, row in zip(self._lengths, new, strict=True)]
        picked = self._agree(None if logits is None else self._picked(self._whole(logits), pick), shape)
        if bool(picked.isnan().any()):
            raise NumericalError(
                "the model's logits are not finite: its weights or the adapter's are damaged, or too large for "
                "train.precision"
            )
        return picked

    def _forward(self, tokens: Tensor) -> Tensor | None:
        """[b, s] -> logits [b, 1, vocabulary / t] of the last real position, on the last stage."""
        output = None
        stages = mpu.get_pipeline_model_parallel_group()
        positions = self._span.positions.clamp(max=self._last_position)  # only padding can lie beyond
        shape = (tokens.shape[1] // self._multiple, tokens.shape[0], self._hidden_size)
        for chunk in self._chunks:
            if not chunk.pre_process:
                received = torch.empty(shape, dtype=self._dtype, device=self._device)
                dist.recv(received, src=mpu.get_pipeline_model_parallel_prev_rank(), group=stages)
                chunk.set_input_tensor(received)
            output = chunk(tokens, positions, None)
            if not chunk.post_process:
                dist.send(output.contiguous(), dst=mpu.get_pipeline_model_parallel_next_rank(), group=stages)
                output = None
        return output

    def _whole(self, logits: Tensor) -> Tensor:
        """This tensor rank's [b, .., vocabulary / t] -> [b, vocabulary] in fp32."""
        whole = gather_from_tensor_model_parallel_region(logits[:, 0].contiguous())
        return whole[:, : self._vocab_size].float()

    @staticmethod
    def _picked(logits: Tensor, pick: Pick) -> Tensor:
        """NaN throughout where a logit is not finite, so that every rank learns of it."""
        return pick(logits).to(torch.float64).masked_fill(~logits.isfinite().all(), torch.nan)

    def _agree(self, picked: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """The first tensor rank's pick of the last stage, on every rank of this copy of the model, on the CPU."""
        if picked is None:
            numbers = torch.zeros(shape, dtype=torch.float64, device=self._device)
        else:
            assert tuple(picked.shape) == shape
            numbers = picked.contiguous()
        if mpu.get_pipeline_model_parallel_world_size() > 1:
            last = mpu.get_pipeline_model_parallel_last_rank()
            dist.broadcast(numbers, src=last, group=mpu.get_pipeline_model_parallel_group())
        if self._tensor_size > 1:
            first = mpu.get_tensor_model_parallel_src_rank()
            dist.broadcast(numbers, src=first, group=mpu.get_tensor_model_parallel_group())
        return numbers.cpu()

    def _hook(self, chunk: GPTModel) -> Iterator[Any]:
        """Rotary angles of each row's own positions, and logits of one position instead of all."""
        if chunk.position_embedding_type == "rope":
            yield chunk.rotary_pos_emb.register_forward_hook(self._angles)
        if chunk.post_process:
            yield chunk.decoder.register_forward_hook(self._last)

    def _angles(self, rotary: nn.Module, args: object, default: Tensor) -> Tensor:
        """megatron-core's angles [s, b, 1, rotary dimensions], both halves alike."""
        inverse: Tensor = rotary.inv_freq  # type: ignore[assignment]
        half = self._span.positions.t()[..., None].to(inverse.dtype) * inverse
        return torch.cat([half, half], -1)[:, :, None]

    def _last(self, block: nn.Module, args: object, hidden: Tensor) -> Tensor:
        """[s or s/t, b, h] -> [1, b, h]: what the output layer shall see."""
        if self._sequence:
            hidden = gather_from_sequence_parallel_region(hidden)
        return hidden[self._ends, torch.arange(hidden.shape[1], device=hidden.device)][None]

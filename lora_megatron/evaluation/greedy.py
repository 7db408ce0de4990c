# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding on a live sharded model, by running the whole prefix at every step.

No key/value cache: meant for a few sentences in a report. Works under TP, PP and VPP; every rank gets the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor, nn

from lora_megatron.parallel.heartbeat import beat


def greedy(
    ddp_chunks: Sequence[nn.Module],
    prompts: Sequence[Sequence[int]],
    *,
    length: int,
    new_tokens: int,
    eos_id: int,
    pad_id: int,
    vocab_size: int,
) -> list[list[int]]:
    """The argmax continuation of each prompt up to `eos_id` (not included), of at most `new_tokens`; collective.

    `length` positions are run at every step, and a prompt is continued until it fills them. One longer than both
    `length` - `new_tokens` and half of `length` loses its beginning.
    """
    prompts = [list(prompt)[-max(length - new_tokens, length // 2) :] for prompt in prompts]
    tokens = torch.full((len(prompts), length), pad_id, dtype=torch.long, device=torch.cuda.current_device())
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    ends = torch.tensor([len(prompt) for prompt in prompts], device=tokens.device)
    starts, alive = ends.clone(), torch.ones_like(ends, dtype=torch.bool)
    limits = (starts + new_tokens).clamp(max=length)
    for chunk in ddp_chunks:
        chunk.eval()
    with torch.no_grad():
        for _ in range(new_tokens):
            beat()
            chosen = _next_tokens(ddp_chunks, tokens, ends - 1, vocab_size)
            alive &= (chosen != eos_id) & (ends < limits)
            if not bool(alive.any()):
                break
            rows = torch.nonzero(alive).squeeze(1)
            tokens[rows, ends[rows]] = chosen[rows]
            ends[rows] += 1
    for chunk in ddp_chunks:
        chunk.train()
    return [tokens[row, int(starts[row]) : int(ends[row])].tolist() for row in range(len(prompts))]


def _next_tokens(ddp_chunks: Sequence[nn.Module], tokens: Tensor, last: Tensor, vocab_size: int) -> Tensor:
    """[b] argmax at position `last` of each row, on every pipeline stage."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    stages = mpu.get_pipeline_model_parallel_world_size()
    rounds = stages if len(ddp_chunks) > 1 else 1  # the interleaved schedule takes whole rounds of microbatches
    chosen = torch.zeros(tokens.shape[0], dtype=torch.long, device=tokens.device)

    def forward(batches: Iterator[Any], model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        next(batches)
        output = model(tokens, positions, None)

        def pick(logits: Tensor, **_: Any) -> Tensor:
            rows = torch.arange(len(last), device=last.device)
            whole = gather_from_tensor_model_parallel_region(logits[rows, last])[:, :vocab_size]
            chosen.copy_(whole.argmax(-1))
            return logits

        return output, pick

    iterators = [iter(range(rounds)) for _ in ddp_chunks]
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iterators if len(ddp_chunks) > 1 else iterators[0],
        model=list(ddp_chunks) if len(ddp_chunks) > 1 else ddp_chunks[0],
        num_microbatches=rounds,
        seq_length=tokens.shape[1],
        micro_batch_size=tokens.shape[0],
        decoder_seq_length=tokens.shape[1],
        forward_only=True,
        collect_non_loss_data=True,
    )
    dist.broadcast(
        chosen, src=mpu.get_pipeline_model_parallel_last_rank(), group=mpu.get_pipeline_model_parallel_group()
    )
    return chosen

# SPDX-License-Identifier: Apache-2.0
"""Whole logits of a sharded model, on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor, nn

from tests.huggingface.models import VOCABULARY


def logits_of(chunks: Sequence[nn.Module], ids: Tensor) -> Tensor:
    """ids [b, s] -> [b, s, VOCABULARY], through the schedules; collective."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    logits = torch.zeros(*ids.shape, VOCABULARY)
    rounds = mpu.get_pipeline_model_parallel_world_size() if len(chunks) > 1 else 1

    def forward(batches: Iterator[Any], model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        next(batches)

        def keep(output: Tensor, **_: Any) -> Tensor:
            logits.copy_(gather_from_tensor_model_parallel_region(output)[..., :VOCABULARY])
            return output

        return model(ids, positions, None), keep

    iterators = [iter(range(rounds)) for _ in chunks]
    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=rounds,
            seq_length=ids.shape[1],
            micro_batch_size=ids.shape[0],
            decoder_seq_length=ids.shape[1],
            forward_only=True,
            collect_non_loss_data=True,
        )
    dist.broadcast(
        logits, src=mpu.get_pipeline_model_parallel_last_rank(), group=mpu.get_pipeline_model_parallel_group()
    )
    return logits

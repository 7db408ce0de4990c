# SPDX-License-Identifier: Apache-2.0
"""Loss on held-out data: every row once, whatever the layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import parallel_state as mpu
from torch import nn

from lora_megatron.data.batches import BatchSource
from lora_megatron.parallel.stopping import stop_if_asked
from lora_megatron.training.step import Batch, StepLoss, run_microbatches

_MICROBATCHES_PER_CALL = 16


def held_out_loss(ddp_chunks: Sequence[nn.Module], source: BatchSource) -> StepLoss:
    """Sum of the loss and number of counted tokens over all of `source`, on every rank; collective.

    Raises:
        Preempted: a termination signal came meanwhile.
    """
    stages = mpu.get_pipeline_model_parallel_world_size()
    # The interleaved schedule takes whole rounds of `stages` microbatches.
    batches = source.evaluation_microbatches(
        mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size(), multiple_of=stages
    )
    call = _MICROBATCHES_PER_CALL * stages
    for chunk in ddp_chunks:
        chunk.eval()
    try:
        with torch.no_grad():
            parts = [_run(ddp_chunks, batches[i : i + call]) for i in range(0, len(batches), call)]
    finally:
        for chunk in ddp_chunks:
            chunk.train()
    bad_ranks = sorted({rank for part in parts for rank in part.bad_ranks})
    return StepLoss(sum(p.total for p in parts), sum(p.tokens for p in parts), tuple(bad_ranks))


def _run(ddp_chunks: Sequence[nn.Module], batches: Sequence[Batch]) -> StepLoss:
    stop_if_asked()  # a long evaluation must not eat the time there is for saving
    return run_microbatches(ddp_chunks, batches, forward_only=True)

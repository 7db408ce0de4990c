# SPDX-License-Identifier: Apache-2.0
"""One training or evaluation step through megatron-core's pipeline schedules.

The objective is the paper's (equation 2): the sum of -log p over the counted tokens, divided by how many there are in
the whole global batch. Gradients are summed over microbatches and data-parallel ranks and divided once, by the
optimizer, so a result does not depend on how the global batch is cut.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn

from lora_megatron.layers.aside import wait_for_all
from lora_megatron.layers.dropout import set_first_sample
from lora_megatron.parallel.agree import gather_text
from lora_megatron.parallel.heartbeat import making_data
from lora_megatron.parallel.sent_outputs import SentOutputs
from lora_megatron.parallel.stage_copies import copies_over
from lora_megatron.training.sequence_gradients import sum_over_sequence_shards

Batch = dict[str, Any]


@dataclass(frozen=True)
class StepLoss:
    """Sum of the loss over counted tokens and their number, over the whole global batch, on every rank."""

    total: float
    tokens: int
    bad_ranks: tuple[int, ...] = ()
    """Ranks whose own part of the loss is not finite."""

    @property
    def mean(self) -> float:
        """Loss per counted token, in nats."""
        return self.total / max(self.tokens, 1)

    @property
    def where(self) -> str:
        """Where a loss that is not finite comes from."""
        return where_not_finite(self.bad_ranks)


def where_not_finite(bad_ranks: Sequence[int]) -> str:
    """`on rank 1, 3`, or in none of them but their sum."""
    return f"on rank {', '.join(map(str, bad_ranks))}" if bad_ranks else "in the sum over ranks"


def _loss(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """losses [b, s] -> (sum over counted tokens, their number, both to report)."""
    total = (losses.float() * mask).sum()
    count = mask.sum()
    return total, count.to(torch.int), torch.stack([total.detach().double(), count.double()])


def forward_step(sent: SentOutputs, batches: Iterator[Batch], model: nn.Module) -> tuple[Tensor, Any]:
    """megatron-core's forward_step_func: run one microbatch through this stage's chunk."""
    wait_for_all()  # the last microbatch's, or what it reads would be held through this one's
    batch = next(batches)
    tokens, labels, positions, mask = (batch[key] for key in ("tokens", "labels", "position_ids", "loss_mask"))
    attention_mask = batch["attention_mask"]
    if batch["first_sample"] is not None:  # a captured step draws no masks, and may not touch the generators
        set_first_sample(batch["first_sample"])
    output = model(tokens, positions, attention_mask, labels=labels)
    # megatron-core has put what the stage received where the chunk reads it; left there it would outlive its backward
    # pass, and with it its gradient.
    get_attr_wrapped_model(model, "set_input_tensor")(None)
    if not get_attr_wrapped_model(model, "post_process"):
        sent.add(output)
    return output, partial(_loss, mask)


def run_microbatches(
    ddp_chunks: Sequence[DistributedDataParallel], microbatches: Sequence[Batch], *, forward_only: bool = False
) -> StepLoss:
    """Forward, and backward unless `forward_only`, over this rank's microbatches.

    Afterwards the gradient buffers hold the gradient of the loss's sum over this global batch, reduced over ranks;
    nothing older. An optimizer divides it by the loss's tokens (`Optimizer.step`).

    `microbatches` are this data-parallel rank's share of the global batch, the same on every pipeline stage. They are
    taken one at a time.
    """
    return reduce_reports(run_passes(ddp_chunks, microbatches, forward_only=forward_only))


def run_passes(
    ddp_chunks: Sequence[DistributedDataParallel], microbatches: Sequence[Batch], *, forward_only: bool = False
) -> list[Tensor]:
    """`run_microbatches` up to the report of each microbatch: its loss and tokens, fp64 [2], on the last stage.

    Nothing in here waits for the device, or a CUDA graph could not hold it (`training.cuda_graph`).
    """
    config = ddp_chunks[0].config
    if not forward_only:
        for chunk in ddp_chunks:
            chunk.zero_grad_buffer()
    config.finalize_model_grads_func = None if forward_only else _finalize
    first = make(microbatches, 0)
    batch_size, sequence_length = first["tokens"].shape
    iterators = _shared(_one_by_one(first, microbatches), readers=len(ddp_chunks))
    with _messages(ddp_chunks[0], batch_size * sequence_length) as messages:
        reports: list[Tensor] = get_forward_backward_func()(
            forward_step_func=partial(forward_step, SentOutputs()),
            data_iterator=iterators if len(ddp_chunks) > 1 else iterators[0],
            model=list(ddp_chunks) if len(ddp_chunks) > 1 else ddp_chunks[0],
            num_microbatches=len(microbatches),
            seq_length=sequence_length,
            micro_batch_size=batch_size,
            decoder_seq_length=sequence_length,
            forward_only=forward_only,
            **messages,
        )
    return reports


def _messages(chunk: DistributedDataParallel, tokens: int) -> contextlib.AbstractContextManager[dict[str, Any]]:
    """What megatron-core's schedules are told of how stages send: nothing, if that is by its own means."""
    if not get_attr_wrapped_model(chunk, "pp_comm_copy"):
        return contextlib.nullcontext({})
    config = chunk.config
    own_tokens = tokens // config.tensor_model_parallel_size if config.sequence_parallel else tokens
    copies = copies_over(mpu.get_pipeline_model_parallel_group(), config)
    return copies.step(own_tokens * config.hidden_size * config.pipeline_dtype.itemsize, config)


def _finalize(chunks: Sequence[DistributedDataParallel], tokens: Tensor, **megatron: Any) -> None:
    """megatron-core's reductions of gradients, but not its division by `tokens`: that would be a pass over all of them,
    and the optimizer makes one anyway."""
    wait_for_all()
    finalize_model_grads(list(chunks), None, **megatron)
    sum_over_sequence_shards(chunks)


def _one_by_one(first: Batch, microbatches: Sequence[Batch]) -> Iterator[Batch]:
    """All of `microbatches`, the first of which is made already, on this rank's device: once for all chunks of a stage,
    each of which would wait for copies of its own."""
    yield _on_device(first)
    for index in range(1, len(microbatches)):
        yield _on_device(make(microbatches, index))


def _shared(batches: Iterator[Batch], *, readers: int) -> list[Iterator[Batch]]:
    """All of them for each reader, made when the first asks and let go of when the last has. (itertools.tee would go on
    holding some dozens.)"""
    ahead = [deque[Batch]() for _ in range(readers)]

    def read(own: deque[Batch]) -> Iterator[Batch]:
        while True:
            if not own:
                batch = next(batches, None)
                if batch is None:
                    return
                for each in ahead:
                    each.append(batch)
                del batch  # whoever runs it holds it, and nobody after that
            yield own.popleft()

    return [read(own) for own in ahead]


def _on_device(batch: Batch) -> Batch:
    device = torch.cuda.current_device()
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def make(microbatches: Sequence[Batch], index: int) -> Batch:
    """Ask for one of them, which makes it."""
    with making_data(then="model"):
        return microbatches[index]


def reduce_reports(reports: Sequence[Tensor]) -> StepLoss:
    """Sum over microbatches and data-parallel ranks, then tell every pipeline stage."""
    device = torch.cuda.current_device()
    sums = torch.stack(list(reports)).sum(0) if reports else torch.zeros(2, dtype=torch.float64, device=device)
    own_is_finite = math.isfinite(float(sums[0]))
    dist.all_reduce(sums, group=mpu.get_data_parallel_group(with_context_parallel=True))
    dist.broadcast(sums, src=mpu.get_pipeline_model_parallel_last_rank(), group=mpu.get_pipeline_model_parallel_group())
    total = float(sums[0])
    bad = () if math.isfinite(total) else [bool(text) for text in gather_text("" if own_is_finite else "not finite")]
    return StepLoss(total, int(sums[1]), tuple(rank for rank, is_bad in enumerate(bad) if is_bad))

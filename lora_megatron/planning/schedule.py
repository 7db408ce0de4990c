# SPDX-License-Identifier: Apache-2.0
"""How much a pipeline stage holds at once: megatron-core's 1F1B schedules, walked event by event.

Stage p of P starts with P - p - 1 forward passes, then alternates forward and backward (Narayanan et al. 2021, section
2.2), so min(P - p, m) of m microbatches are in flight. Interleaved over v chunks a stage starts with 2 (P - p - 1) +
(v - 1) P passes, taking P microbatches through its first chunk, then the same through its next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lora_megatron.planning.activations import ChunkBytes


@dataclass(frozen=True)
class Peak:
    """The moment at which a stage holds most."""

    activations: float
    loss: float

    @property
    def bytes(self) -> float:
        return self.activations + self.loss


def passes(stage: int, stages: int, chunks: int, microbatches: int) -> Iterator[tuple[bool, int]]:
    """(is forward, chunk) of every pass of one step, in order, on pipeline stage `stage`."""
    forward = list(_chunk_order(stages, chunks, microbatches))
    backward = [chunks - 1 - chunk for chunk in forward]
    total = len(forward)
    warm_up = stages - stage - 1
    if chunks > 1:
        warm_up = 2 * warm_up + (chunks - 1) * stages
    warm_up = min(warm_up, total)
    yield from ((True, chunk) for chunk in forward[:warm_up])
    for index in range(total - warm_up):
        yield True, forward[warm_up + index]
        yield False, backward[index]
    yield from ((False, chunk) for chunk in backward[total - warm_up :])


def _chunk_order(stages: int, chunks: int, microbatches: int) -> Iterator[int]:
    for first in range(0, microbatches, stages):
        group = min(stages, microbatches - first)
        for chunk in range(chunks):
            yield from [chunk] * group


def peak(
    stage: int,
    stages: int,
    chunks: Sequence[ChunkBytes],
    microbatches: int,
    *,
    size: Callable[[Peak], float] = lambda moment: moment.bytes,
) -> Peak:
    """The largest moment of a step by `size`, given what each chunk keeps of one microbatch."""
    # A step repeats itself once the pipeline is full, so a few rounds tell.
    microbatches = min(microbatches, 4 * stages)
    held = [0] * len(chunks)
    worst = Peak(0.0, 0.0)
    for is_forward, index in passes(stage, stages, len(chunks), microbatches):
        now = sum(count * chunk.held for count, chunk in zip(held, chunks, strict=True))
        loss = sum(count * chunk.loss for count, chunk in zip(held, chunks, strict=True))
        if is_forward:
            held[index] += 1
            moment = Peak(now + chunks[index].held, loss + chunks[index].loss)
        else:  # the loss is through before the first layer is rebuilt
            rebuilt = max(chunks[index].recomputed, chunks[index].held)
            moment = Peak(now - chunks[index].held + rebuilt, loss - chunks[index].loss)
            held[index] -= 1
        worst = max(worst, moment, key=size)
    assert not any(held), "every forward pass has its backward pass"
    return worst

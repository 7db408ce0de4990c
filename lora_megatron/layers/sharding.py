# SPDX-License-Identifier: Apache-2.0
"""How a parameter is cut over the tensor-parallel ranks, declared once by the layer that owns it.

Saving, resharding, merging and exporting all read the declaration on the parameter (`shard_of`), so a layer that
forgets it cannot silently save one rank's part as if it were the whole: `shard_of` refuses an undeclared parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """The cut of one tensor: `axis` None means every rank holds all of it.

    `blocks` > 1: the full tensor is that many equal blocks stacked along `axis`, each of them cut by itself. A gated
    fc1 is [gate; up], and a rank holds [its rows of gate; its rows of up].

    `padding`: rows of zeros that follow the true tensor on the last ranks, so that a vocabulary divides. They exist in
    memory only: `full_shape`, `join` and what is saved never include them.
    """

    axis: int | None = None
    blocks: int = 1
    padding: int = 0

    def full_shape(self, local: Sequence[int], size: int) -> tuple[int, ...]:
        """Shape of the true tensor, given the shape of a rank's part and the number of ranks."""
        return tuple(n * size - self.padding if axis == self.axis else n for axis, n in enumerate(local))

    def part(self, full: Any, shape: Sequence[int], rank: int, size: int) -> Tensor:
        """The part of `full` that tensor rank `rank` of `size` holds.

        `full` is a tensor of `shape`, or anything that slices like one (a safetensors slice reads only those bytes).
        """
        if self.axis is None or size == 1:
            return self._pad(full[:], 0 if self.axis is None else shape[self.axis] + self.padding)
        block = (shape[self.axis] + self.padding) // self.blocks
        step = block // size
        pieces = []
        for index in range(self.blocks):
            start = index * block + rank * step
            stop = min(start + step, shape[self.axis])
            where = (slice(None),) * self.axis + (slice(min(start, stop), stop),)
            pieces.append(full[where])
        joined = pieces[0] if self.blocks == 1 else torch.cat(pieces, self.axis)
        return self._pad(joined, step * self.blocks)

    def _pad(self, tensor: Tensor, length: int) -> Tensor:
        if not self.padding or tensor.shape[0] == length:
            return tensor
        assert self.axis == 0, "only rows are padded"
        return torch.cat([tensor, tensor.new_zeros(length - tensor.shape[0], *tensor.shape[1:])])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The true tensor from every rank's part, in rank order."""
        if self.axis is None:
            return parts[0]
        per_rank = [part.chunk(self.blocks, self.axis) for part in parts]
        blocks = [ranks[block] for block in range(self.blocks) for ranks in per_rank]
        full = blocks[0] if len(blocks) == 1 else torch.cat(blocks, self.axis)
        return full.narrow(self.axis, 0, full.shape[self.axis] - self.padding)


REPLICATED = Shard()


def declare(parameter: torch.nn.Parameter, shard: Shard, *, sum_over_sequence_shards: bool = False) -> None:
    """Write the declaration on `parameter`, for us and for megatron-core.

    `sum_over_sequence_shards`: the parameter is replicated but each tensor rank sees only its shard of the sequence,
    so its gradient is a partial sum that must be summed over the tensor-parallel group
    (`training.sequence_gradients`; megatron-core, which would do it for those it calls `sequence_parallel`, is told
    that there are none).
    """
    assert shard.axis is None or not sum_over_sequence_shards
    # The declaration travels on the tensor, as megatron-core's own marks do, which torch's types cannot know.
    parameter.shard = shard  # type: ignore[attr-defined]
    for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
        if hasattr(parameter, name):
            delattr(parameter, name)
    set_tensor_model_parallel_attributes(
        parameter, shard.axis is not None, -1 if shard.axis is None else shard.axis, shard.blocks
    )
    parameter.sequence_parallel = False  # type: ignore[attr-defined]  # as above: megatron-core's mark
    parameter.sum_over_sequence_shards = sum_over_sequence_shards  # type: ignore[attr-defined]  # and our own


def is_summed_over_sequence_shards(parameter: torch.nn.Parameter) -> bool:
    """Whether `declare` said so."""
    return bool(getattr(parameter, "sum_over_sequence_shards", False))


def shard_of(parameter: torch.nn.Parameter) -> Shard:
    """The declaration written by `declare`; an undeclared parameter is a bug."""
    shard = getattr(parameter, "shard", None)
    assert isinstance(shard, Shard), f"a parameter of shape {tuple(parameter.shape)} has no sharding declaration"
    return shard

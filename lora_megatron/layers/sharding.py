# SPDX-License-Identifier: Apache-2.0
"""How a parameter is cut over the tensor-parallel ranks, declared once by the layer that owns it.

Saving, resharding, merging and exporting all read the declaration on the parameter (`shard_of`), so a layer that
forgets it cannot silently save one rank's part as if it were the whole: `shard_of` refuses an undeclared parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """The cut of one tensor: `axis` None means every rank holds all of it.

    `blocks` > 1 means the full tensor is that many equal blocks stacked along `axis`, each of them cut by itself: a
    gated fc1 is [gate; up] (2 blocks), and a rank holds [its rows of gate; its rows of up].
    """

    axis: int | None = None
    blocks: int = 1

    def part(self, full: Tensor, rank: int, size: int) -> Tensor:
        """The part of `full` that tensor rank `rank` of `size` holds (a copy only where blocks must be joined)."""
        if self.axis is None or size == 1:
            return full
        blocks = [block.chunk(size, self.axis)[rank] for block in full.chunk(self.blocks, self.axis)]
        return blocks[0] if self.blocks == 1 else torch.cat(blocks, self.axis)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The full tensor from every rank's part, in rank order."""
        if self.axis is None or len(parts) == 1:
            return parts[0]
        per_rank = [part.chunk(self.blocks, self.axis) for part in parts]
        return torch.cat([ranks[block] for block in range(self.blocks) for ranks in per_rank], self.axis)

    def full_shape(self, shape: Sequence[int], size: int) -> tuple[int, ...]:
        """The shape of the full tensor, given the shape of a rank's part."""
        return tuple(n * size if axis == self.axis else n for axis, n in enumerate(shape))


REPLICATED = Shard()


def declare(parameter: torch.nn.Parameter, shard: Shard, *, sum_over_sequence_shards: bool = False) -> None:
    """Write the declaration on `parameter`, for us and for megatron-core.

    `sum_over_sequence_shards`: the parameter is replicated but each tensor rank sees only its shard of the sequence,
    so its gradient is a partial sum that must be summed over the tensor-parallel group (`sequence_parallel` is
    megatron-core's name for it).
    """
    assert shard.axis is None or not sum_over_sequence_shards
    parameter.shard = shard  # type: ignore[attr-defined]
    for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
        if hasattr(parameter, name):
            delattr(parameter, name)
    set_tensor_model_parallel_attributes(
        parameter, shard.axis is not None, -1 if shard.axis is None else shard.axis, shard.blocks
    )
    parameter.sequence_parallel = sum_over_sequence_shards  # type: ignore[attr-defined]


def shard_of(parameter: torch.nn.Parameter) -> Shard:
    """The declaration written by `declare`; an undeclared parameter is a bug."""
    shard = getattr(parameter, "shard", None)
    assert isinstance(shard, Shard), f"a parameter of shape {tuple(parameter.shape)} has no sharding declaration"
    return shard

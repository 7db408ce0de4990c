# SPDX-License-Identifier: Apache-2.0
"""A rank's part of the logits, and what goes between the ranks of a loss over them (`layers.vocabulary_loss`).

Hidden states go to all ranks, each of which has its columns of W^T; their gradients are summed over the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabularyShard:
    """Which columns of the logits this rank has, and with whom it shares the rest."""

    first: int
    """Global index of its first column."""
    real: int
    """How many of its columns, from the first, are tokens; the rest is padding and gets no probability."""
    group: dist.ProcessGroup | None = None
    """The tensor-parallel group; None if it is one rank."""
    sequence_parallel: bool = False
    """Whether each rank of the group holds the hidden states of its own part of the sequence only."""

    @property
    def size(self) -> int:
        return self.group.size() if self.group is not None else 1

    @property
    def parts(self) -> int:
        """Of the sequence, one per rank that holds hidden states of its own."""
        return self.size if self.sequence_parallel else 1

    def gather_tokens(self, own: Tensor) -> Tensor:
        """[n, h] of this rank -> [parts n, h]."""
        if self.parts == 1:
            return own
        whole = own.new_empty(self.parts * own.shape[0], own.shape[1])
        dist.all_gather_into_tensor(whole, own, group=self.group)
        return whole

    def sum_over_ranks(self, partial: Tensor, out: Tensor) -> None:
        """[parts n, h], of each rank's columns -> out [n, h], of all columns, of this rank's tokens."""
        if self.parts > 1:
            dist.reduce_scatter_tensor(out, partial, group=self.group)
            return
        if self.group is not None:
            dist.all_reduce(partial, group=self.group)
        out.copy_(partial)

# SPDX-License-Identifier: Apache-2.0
"""The target of each token in `layers.vocabulary_loss`: its label, or the label smoothed.

    t_v = (1 - e) 1[v = label] + e / V    over the V tokens of the vocabulary; padded columns are none
    loss = log sum_v exp(z_v) - sum_v t_v z_v = (1 - e) (-log p_label) + e mean_v (-log p_v)
    dloss/dz = p - t

as torch's cross_entropy(label_smoothing=e) and Microsoft's LoRA code for GPT-2 have it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Smoothing:
    """How much of each target is spread evenly over a vocabulary, the label included; nothing by default."""

    share: float = 0.0
    vocabulary: int = 1
    """Tokens there are, on all ranks together; padding is none."""

    @property
    def each(self) -> float:
        return self.share / self.vocabulary


NO_SMOOTHING = Smoothing()


@dataclass(frozen=True)
class Labels:
    """Where the labels of a chunk are: which are among this rank's columns, from `first`, and in which column."""

    here: Tensor
    """[n], 1 or 0 in fp32."""
    column: Tensor
    """[n, 1], some column for labels of other ranks."""

    @classmethod
    def of(cls, labels: Tensor, first: int, columns: int, dtype: torch.dtype) -> Labels:
        own = labels - first
        return cls(((own >= 0) & (own < columns)).to(dtype), own.clamp(0, columns - 1).unsqueeze(1))

    def logit(self, logits: Tensor, real: int, smoothing: Smoothing) -> Tensor:
        """[n, V/t] -> [n]: this rank's part of the target's mean logit; unsmoothed, the label's if it is here."""
        at_label = logits.gather(1, self.column).squeeze(1).to(self.here.dtype) * self.here
        if not smoothing.share:
            return at_label
        everywhere = logits[:, :real].sum(1, dtype=self.here.dtype)
        return (1 - smoothing.share) * at_label + smoothing.each * everywhere

    def subtract_smoothed(self, p: Tensor, weight: Tensor | float, real: int, smoothing: Smoothing) -> Tensor:
        """p [n, V/t], times the tokens' weights [n, 1] -> p - target, times them; in place."""
        p[:, :real].sub_(smoothing.each * weight)
        at_label = p.gather(1, self.column) - (1 - smoothing.share) * weight * self.here.unsqueeze(1)
        return p.scatter_(1, self.column, at_label)

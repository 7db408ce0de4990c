# SPDX-License-Identifier: Apache-2.0
"""Which evaluation of a run is its best."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel


@dataclass(frozen=True)
class Best:
    """The best evaluation so far."""

    step: int
    value: float


@dataclass(frozen=True)
class Selection:
    """The number that evaluations are compared by; equal ones leave the earlier step the best."""

    name: str
    """As `train.best` has it."""
    higher_is_better: bool = False
    measure: Callable[[Sequence[DistributedDataParallel]], float] | None = None
    """Takes it from the model, the same value on every rank; collective. None: it is the held-out loss."""

    def improves(self, value: float, *, over: Best | None) -> bool:
        """Whether `value` is better than the best so far; one that is not finite never is."""
        if not math.isfinite(value):
            return False
        return over is None or (value > over.value if self.higher_is_better else value < over.value)

# SPDX-License-Identifier: Apache-2.0
"""Whether a step may change the model: decided before the optimizer steps, by all ranks together.

One all-reduce of four numbers a step carries all that ranks have to agree on: gradients, loss, spike, signal.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from lora_megatron.parallel.agree import device_for_collectives, gather_text
from lora_megatron.parallel.stopping import received
from lora_megatron.training.step import StepLoss, where_not_finite

WINDOW = 20
_FEWEST_LOSSES = 5  # a median of fewer says little


@dataclass(frozen=True)
class Verdict:
    """The same on every rank."""

    problem: str = ""
    """What is wrong with the step; nothing: it is good."""
    where: str = ""
    """Which ranks it comes from."""
    signal: int = 0
    """The termination signal that came to some rank; 0: none."""


class SpikeGuard:
    """The losses of the last 20 good steps; a loss above `factor` times their median is a spike (0: none is)."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def accept(self, loss: float) -> None:
        """Remember the loss of a good step."""
        self._losses.append(loss)

    def restart(self, losses: Iterable[float]) -> None:
        """Remember these instead, oldest first: the run goes on from an earlier step."""
        self._losses = deque(losses, maxlen=WINDOW)

    def complaint(self, loss: float) -> str:
        """Why this loss is a spike; nothing if it is none, or too few steps were taken to tell."""
        if not self._factor or len(self._losses) < _FEWEST_LOSSES:
            return ""
        median = statistics.median(self._losses)
        if not loss > self._factor * median:
            return ""
        return (
            f"loss is {loss:.4g}, more than train.spike_factor = {self._factor:g} times {median:.4g} (the median of "
            f"the last {len(self._losses)} steps),"
        )


def judge(loss: StepLoss, chunks: Sequence[DistributedDataParallel], guard: SpikeGuard) -> Verdict:
    """Look at the loss and the gradients of a step and at the signals that came; collective."""
    is_finite, spike = math.isfinite(loss.mean), guard.complaint(loss.mean)
    bad_gradient = _has_bad_gradient(chunks)
    zero = torch.zeros((), dtype=torch.int32, device=device_for_collectives())
    own = [zero + (not is_finite), bad_gradient.to(zero), zero + bool(spike), zero + received()]
    anywhere = torch.stack(own)
    dist.all_reduce(anywhere, dist.ReduceOp.MAX)
    bad_loss, bad_gradients, is_spike, signal = anywhere.tolist()
    if bad_loss:
        return Verdict(f"loss is {loss.mean}", loss.where, signal)
    if bad_gradients:
        bad = [rank for rank, text in enumerate(gather_text("bad" if bad_gradient else "")) if text]
        return Verdict("gradient norm is nan", where_not_finite(bad), signal)
    if is_spike:
        return Verdict(spike or f"loss is {loss.mean:.4g}, a spike to another rank,", "over all ranks", signal)
    return Verdict(signal=signal)


def _has_bad_gradient(chunks: Sequence[DistributedDataParallel]) -> Tensor:
    """Whether a gradient of this rank is not finite, a boolean on the device.

    The gradient norm would not tell: it counts a replicated parameter on one tensor rank only.
    """
    largest = [torch.linalg.vector_norm(b.grad_data, math.inf) for chunk in chunks for b in chunk.buffers]
    zero = torch.zeros((), device=device_for_collectives())
    return (~torch.isfinite(torch.stack([zero, *(value.to(zero) for value in largest)]))).any()

# SPDX-License-Identifier: Apache-2.0
"""Seconds of training steps, and of their two parts: forward and backward, optimizer.

What is timed is `training.loop.train_step`, the step that training runs: data, forward, backward, reductions, the
check for values that are not finite, clipping, update. The device is idle at both ends of every interval.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lora_megatron.errors import NumericalError
from lora_megatron.parallel.agree import gather_text
from lora_megatron.training.loop import StepReport, Trainer, train_step
from lora_megatron.training.optimizer import Optimizer


def now() -> float:
    """Seconds on a clock, once the device has done all it was given."""
    torch.cuda.synchronize()  # on a machine without a GPU this is redirected to nothing (parallel.cpu_backend)
    return time.perf_counter()


@dataclass(frozen=True)
class StepSeconds:
    """One step on one rank; `forward_backward` is the rest: data, both passes, reductions of gradients, the check."""

    whole: float
    optimizer: float

    @property
    def forward_backward(self) -> float:
        return self.whole - self.optimizer


class TimedOptimizer:
    """An optimizer whose `step` is timed; everything else is the inner one's."""

    def __init__(self, inner: Optimizer) -> None:
        self._inner = inner
        self.seconds = 0.0
        """Of the last `step`."""

    def step(self, tokens: int) -> float:
        started = now()
        norm = self._inner.step(tokens)
        self.seconds = now() - started
        return norm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def timed_step(trainer: Trainer) -> tuple[StepSeconds, StepReport]:
    """One training step; `trainer.optimizer` must be a `TimedOptimizer`.

    Raises:
        NumericalError: the step made no update, so its time would be a lie.
    """
    optimizer = trainer.optimizer
    assert isinstance(optimizer, TimedOptimizer)
    optimizer.seconds = math.nan
    started = now()
    report, _ = train_step(trainer)
    whole = now() - started
    if not all(map(math.isfinite, (report.loss, report.grad_norm, optimizer.seconds))):
        raise NumericalError(
            f"loss is {report.loss} and gradient norm {report.grad_norm} in step {report.step} of the bench, which "
            "then updates nothing and measures nothing: lower optimizer.lr"
        )
    trainer.step = report.step
    return StepSeconds(whole, optimizer.seconds), report


def slowest_of_each(mine: Sequence[StepSeconds]) -> list[StepSeconds]:
    """Of every step the times of the rank that took longest, on every rank; collective."""
    texts = gather_text(json.dumps([asdict(step) for step in mine]))
    by_rank = [[StepSeconds(**step) for step in json.loads(text)] for text in texts]
    return [max(steps, key=lambda step: step.whole) for steps in zip(*by_rank, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, and the 10th and 90th percentile (between neighbours, linearly)."""
    tensor = torch.tensor(list(values), dtype=torch.float64)
    low, high = torch.quantile(tensor, torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
    return {"median": statistics.median(values), "p10": low, "p90": high}

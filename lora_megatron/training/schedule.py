# SPDX-License-Identifier: Apache-2.0
"""The learning rate of each step, a function of the step alone."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int, schedule: str) -> float:
    """Learning rate of step 1 .. `steps`: linear warm-up to `peak`, then linear or cosine decay to 0, or constant.

    The last step of a decay still moves: rates are taken at the middle of its interval's end, (steps - step + 1).
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    left = (steps - step + 1) / max(1, steps - warmup_steps)
    return peak * left if schedule == "linear" else peak * 0.5 * (1 - math.cos(math.pi * left))

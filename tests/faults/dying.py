# SPDX-License-Identifier: Apache-2.0
"""`lora-megatron` on a rank that dies: `python -m tests.faults.dying train ...`, as torchrun starts it.

The environment says when: in the attempt number n (torchrun counts its restarts) rank RANK_TO_KILL dies in the middle
of step STEPS_TO_DIE_AT[n], by SIGKILL; in attempts beyond that list nobody does.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

from lora_megatron.__main__ import main
from lora_megatron.parallel.launcher import restart_count
from lora_megatron.training import loop


def die_in_a_step() -> None:
    """Hook the death into this process if it is the one."""
    steps = [int(step) for step in os.environ["STEPS_TO_DIE_AT"].split(",")]
    attempt, victim = restart_count(), os.environ["RANK_TO_KILL"]
    if attempt >= len(steps) or os.environ["RANK"] != victim:
        return
    judge, train_step, step = loop.judge, loop.train_step, 0

    def step_to_take(trainer: Any) -> Any:
        nonlocal step
        step = trainer.step + 1
        return train_step(trainer)

    def judge_or_die(*arguments: Any) -> Any:
        if step == steps[attempt]:
            os.kill(os.getpid(), signal.SIGKILL)
        return judge(*arguments)

    loop.train_step, loop.judge = step_to_take, judge_or_die


if __name__ == "__main__":
    torch.set_num_threads(1)
    die_in_a_step()
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""What becomes of a run after a bad step: `train.on_bad_step`.

A step number counts updates of the model. A bad step updates nothing and its number is taken again, by the samples that
come next: what follows is the course of a run whose data never held the bad ones. `skip` leaves out the bad batch,
`rollback` also what came since the newest checkpoint that is known to be good. Only the position in the data moves on,
and it is in every checkpoint, so a resumed run repeats each decision or has it behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lora_megatron.config import Config
from lora_megatron.errors import NumericalError
from lora_megatron.training.verdict import Verdict

STOP, SKIP, ROLLBACK = "stop", "skip", "rollback"


@dataclass
class BadSteps:
    """How many there have been, as far as the limits are concerned."""

    in_a_row: int = 0
    rollbacks: int = 0


@dataclass(frozen=True)
class BadStep:
    """One bad step: a line of bad_steps.jsonl."""

    step: int
    problem: str
    where: str
    action: str
    first_sample: int
    samples: int
    """The global batch is samples first_sample .. first_sample + samples - 1 of the stream."""

    @property
    def message(self) -> str:
        """`loss is nan at step 5 (on rank 1)`."""
        return f"{self.problem} at step {self.step} ({self.where})"


def decide(config: Config, so_far: BadSteps, verdict: Verdict, *, step: int, first_sample: int) -> BadStep:
    """What the policy says of a bad step, counted in `so_far`; beyond its limit it is `stop`."""
    policy, most = config.train.on_bad_step, config.train.max_bad_steps
    so_far.in_a_row += policy == SKIP
    so_far.rollbacks += policy == ROLLBACK
    exhausted = max(so_far.in_a_row, so_far.rollbacks) > most
    action = STOP if exhausted else policy
    return BadStep(step, verdict.problem, verdict.where, action, first_sample, config.data.global_batch_size)


def error_of(bad: BadStep, config: Config, where_to_resume: Callable[[], str]) -> NumericalError:
    """The error a run ends with."""
    policy, most = config.train.on_bad_step, config.train.max_bad_steps
    limit = {
        STOP: "",
        SKIP: f", after train.max_bad_steps = {most} skipped in a row",
        ROLLBACK: f", after going back train.max_bad_steps = {most} times",
    }[policy]
    return NumericalError(
        f"{bad.message}{limit}: training stopped and no update was applied; {where_to_resume()}; lower optimizer.lr, "
        "set optimizer.clip_grad, or look at this step's data"
    )

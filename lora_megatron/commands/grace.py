# SPDX-License-Identifier: Apache-2.0
"""Whether a run can save itself between a termination signal and the kill, and what its user is told of it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import torch

from lora_megatron.commands.summary import Run
from lora_megatron.layers.sharding import shard_of
from lora_megatron.measure.units import show_bytes, show_seconds
from lora_megatron.model.names import named_parameters
from lora_megatron.parallel.agree import gather_text
from lora_megatron.parallel.launcher import grace_of_torchrun

_STATE_BYTES = 12  # per trained parameter: fp32 master and two moments


class Grace:
    """The time a signal leaves: what the run was told, or what torchrun allows if that is less."""

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        self._say, self._warned = say, False
        self._said = run.config.run.grace_seconds
        self._torchrun = grace_of_torchrun(torch.__version__)
        self.seconds = min(self._said, math.inf if self._torchrun is None else self._torchrun)

    def announce(self, checkpoint_bytes: int) -> None:
        """One line at the start."""
        limit = f"run.grace_seconds = {self._said:g}"
        if self.seconds < self._said:
            limit = f"torchrun kills {self.seconds:g} s after it ({self._remedy()}), although {limit}"
        self._say(
            f"SIGTERM, SIGINT, SIGUSR1 or SIGUSR2: a checkpoint (about {show_bytes(checkpoint_bytes)}) after the step "
            f"under way, then status 75; to end at once: kill -9; {limit}"
        )

    def check(self, step_seconds: float, save_seconds: float | None) -> None:
        """Warn, once, as soon as both are measured and do not fit together."""
        if self._warned or save_seconds is None or step_seconds + save_seconds <= self.seconds:
            return
        self._warned = True
        remedy = (
            self._remedy() if self.seconds < self._said else "raise run.grace_seconds and the scheduler's lead time"
        )
        self._say(
            f"warning: a step takes {show_seconds(step_seconds)}, a save {show_seconds(save_seconds)}, together more "
            f"than the {self.seconds:g} s between a termination signal and the kill: what was done since the last "
            f"checkpoint may be lost; {remedy}, or lower data.global_batch_size"
        )

    def _remedy(self) -> str:
        seconds = math.ceil(self._said)
        newest = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12)
        own = "start with launch/torchrun.sh, which waits"
        if not newest or "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in os.environ:
            return own
        return f"{own}, or set TORCH_ELASTIC_SHUTDOWN_TIMEOUT={seconds}"


def checkpoint_bytes(run: Run) -> int:
    """What a checkpoint takes on the disk, but for its manifest; collective."""
    ranks, total = run.ranks, 0
    if ranks.tensor == 0 and ranks.data == 0:
        for named in named_parameters(run.bare_chunks):
            parameter = named.parameter
            if named.is_copy or not parameter.requires_grad:
                continue
            count = math.prod(shard_of(parameter).full_shape(parameter.shape, ranks.tensor_size))
            total += count * (_STATE_BYTES + (0 if run.method.trains_base else parameter.element_size()))
    return sum(int(text) for text in gather_text(str(total)))

# SPDX-License-Identifier: Apache-2.0
"""When checkpoints of a run are taken, and that each has become whole before the next one, or the end.

`train.async_save` decides only whether training waits for the writing: what is written is the same, byte for byte.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lora_megatron.checkpoint.background import BackgroundFolder
from lora_megatron.checkpoint.state import Progress, save_checkpoint
from lora_megatron.commands.summary import Run
from lora_megatron.errors import CheckpointError, LostRankError, Preempted, UserError
from lora_megatron.model.names import named_parameters
from lora_megatron.training.optimizer import trained


class Saver:
    """The checkpoints of one run, at most one of which is being written. All methods are collective.

    A context: left in order or through an error that all ranks raise together, it finishes the one under way; left
    through anything else, when the other ranks may be gone, it waits only for this rank's own thread.
    """

    def __init__(self, run: Run, identity: dict[str, Any], adapter_facts: dict[str, Any]) -> None:
        self._run, self._identity, self._adapter_facts = run, identity, adapter_facts
        self._under_way: BackgroundFolder | None = None
        self._copying = 0.0
        self.seconds: float | None = None
        """On rank 0, how long the last one took, from the copy, for which training waits, to its publication."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._under_way is None:
            return
        if error is None or isinstance(error, Preempted):
            self.wait()  # if that fails, a preempted run has failed
        elif isinstance(error, UserError) and not isinstance(error, LostRankError):
            try:
                self.wait()
            except CheckpointError as second:  # what ended the run is what is told by its status
                if self._run.ranks.is_main:
                    print(f"the checkpoint under way was not saved: {second}", file=sys.stderr, flush=True)
        else:
            self._under_way.close()

    def save(self) -> None:
        """Take a checkpoint of where the run stands, after the one under way is whole.

        Raises:
            CheckpointError: on all ranks: it, or the one before it, cannot be written.
            NumericalError: the same, for a tensor that is not finite.
        """
        self.wait()
        started = time.monotonic()
        run, trainer = self._run, self._run.trainer
        parameters = trained(list(named_parameters(run.bare_chunks)))
        self._under_way = save_checkpoint(
            Path(run.config.run.dir),
            run.bare_chunks,
            lambda: trainer.optimizer.named_state(parameters),
            parameters,
            progress=Progress(trainer.step, trainer.consumed_samples),
            identity=self._identity,
            method=run.method,
            shape=run.base.shape,
            adapter_facts=self._adapter_facts,
            keep=run.config.train.keep_checkpoints,
        )
        self._copying = time.monotonic() - started
        if not run.config.train.async_save:
            self.wait()

    def look(self) -> None:
        """At a step's end: let the one under way become a checkpoint when all its files are whole.

        Raises:
            CheckpointError: on all ranks: it cannot be written; nothing half-written remains.
        """
        if self._under_way is not None:
            self._settle(self._under_way.advance)

    def wait(self) -> None:
        """Until nothing is under way. Raises as `look` does."""
        if self._under_way is not None:
            self._settle(self._under_way.wait)

    def _settle(self, proceed: Callable[[], bool | None]) -> None:
        under_way, self._under_way = self._under_way, None  # also when it fails: it is given up then
        assert under_way is not None
        if proceed() is False:
            self._under_way = under_way
        if under_way.seconds is not None:
            self.seconds = self._copying + under_way.seconds

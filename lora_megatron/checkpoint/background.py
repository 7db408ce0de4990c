# SPDX-License-Identifier: Apache-2.0
"""A folder that all ranks write while they go on with something else.

Each rank writes its files in a thread of its own (writing, flushing and hashing hold no lock of Python's). At the
boundaries of its choice the program looks, with all ranks, how far they are; when every part is whole, rank 0 seals and
renames the folder, in a thread too. Threads never take part in a collective.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Generic, TypeVar

import torch.distributed as dist

from lora_megatron.checkpoint.folder import Receipt, disk_errors, prepare_folder, temporary_of
from lora_megatron.errors import UserError
from lora_megatron.parallel.agree import gather_text, together

T = TypeVar("T")
Receipts = dict[str, Receipt]


class Background(Generic[T]):
    """An action in a thread; what it returns or raises is met by whoever asks for the result."""

    def __init__(self, action: Callable[[], T], *, name: str) -> None:
        self._result: T | None = None
        self._failure: BaseException | None = None

        def run() -> None:
            try:
                self._result = action()
            except BaseException as failure:  # raised again by `result`, in the thread that asks
                self._failure = failure

        # Not a daemon: the interpreter, should it end by itself, waits until a file is whole.
        self._thread = threading.Thread(target=run, name=name)
        self._thread.start()

    @property
    def state(self) -> str:
        """Empty while it is at work, then `whole` or `failed`."""
        if self._thread.is_alive():
            return ""
        return "failed" if self._failure else "whole"

    def join(self) -> None:
        """Wait until it has ended, in whichever way."""
        self._thread.join()

    def result(self) -> T:
        """What it returned, or what it raised; waits for it."""
        self.join()
        if self._failure is not None:
            raise self._failure
        return self._result  # type: ignore[return-value]  # None only if the action returns None


class BackgroundFolder:
    """`final` under way. All but `close` are collective: every rank calls them at the same points.

    `write(temporary)` runs on every rank: it writes this rank's files and answers their receipts.
    `publish(temporary, receipts)` runs on rank 0 once every rank's files are whole and gives the folder its name.
    `one_writer`: rank 0 alone writes, so that nobody has to be asked in between.

    Raises:
        CheckpointError: on all ranks: `final` exists, or the place cannot be written.
    """

    def __init__(
        self,
        final: Path,
        write: Callable[[Path], Receipts],
        publish: Callable[[Path, Receipts], None],
        *,
        one_writer: bool,
    ) -> None:
        self.final = final
        self.seconds: float | None = None
        """On rank 0, time from here to the publication; None before it."""
        self._started = time.monotonic()
        self._temporary = temporary_of(final)
        self._publish = publish
        together(lambda: prepare_folder(final, self._temporary))
        self._stage = "publishing" if one_writer else "writing"
        self._work: Background[Receipts] = self._start(lambda: self._write(write, publishes=one_writer))

    def _start(self, action: Callable[[], Receipts]) -> Background[Receipts]:
        return Background(action, name=f"save-{self.final.name}")

    def _write(self, write: Callable[[Path], Receipts], *, publishes: bool) -> Receipts:
        with disk_errors(self.final):
            receipts = write(self._temporary)
            if publishes:
                self._publish_if_main(receipts)
        return receipts

    def _publish_if_main(self, receipts: Receipts) -> Receipts:
        if dist.get_rank() == 0:
            with disk_errors(self.final):
                self._publish(self._temporary, receipts)
            self.seconds = time.monotonic() - self._started
        return {}

    def advance(self) -> bool:
        """Look how far it is and take the next step; True when the folder stands under its name.

        Raises:
            CheckpointError: on all ranks alike, when any rank has failed; the temporary is removed.
        """
        states = gather_text(self._work.state)
        if "failed" in states:
            self._give_up()
        if "" in states:
            return False
        if self._stage == "writing":
            mine = json.dumps({name: asdict(receipt) for name, receipt in self._work.result().items()})
            everybody = [_receipts(json.loads(text)) for text in gather_text(mine)]
            merged = {name: receipt for receipts in everybody for name, receipt in receipts.items()}
            self._stage = "publishing"
            self._work = self._start(lambda: self._publish_if_main(merged))
            return False
        return True

    def wait(self) -> None:
        """Until the folder stands under its name. Raises as `advance` does."""
        done = False
        while not done:
            self._work.join()
            done = self.advance()

    def close(self) -> None:
        """Wait for this rank's own thread, when the other ranks may be gone. What is not published then never is."""
        self._work.join()

    def _give_up(self) -> None:
        """Let every rank raise what one has met, when none writes any more."""
        self._work.join()
        try:
            together(self._work.result)
        except UserError:
            if dist.get_rank() == 0:
                shutil.rmtree(self._temporary, ignore_errors=True)
            raise


def _receipts(values: Mapping[str, Mapping[str, object]]) -> Receipts:
    return {name: Receipt(sha256=str(v["sha256"]), bytes=int(str(v["bytes"]))) for name, v in values.items()}

# SPDX-License-Identifier: Apache-2.0
"""A thread on every rank that ends the job when it hangs, and says which rank it hangs on.

Each rank keeps its last beat in a small file of the run folder, which its peers read only when they have made no
progress themselves for half of the time allowed. A rank whose file no longer changes is stopped or gone; of those that
run, the one furthest behind is it. Files need no collective, no store that lives on a rank that may be the stopped one,
and no clock that ranks share. What touches the disk is a thread apart: a dead disk must not hold up the verdict.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from lora_megatron.errors import LostRankError
from lora_megatron.parallel.hang import Peer, explain_hang, speaker
from lora_megatron.parallel.heartbeat import beat, last_beat

STACKS = "stacks"
BEATS_NAME = ".heartbeats"
_LONGEST_PERIOD = 10.0
_PERIODS = 6  # in the time allowed
_LINE_BYTES = 160  # one line of one size, written in place: a reader never sees half of it


class Watchdog:
    """Watches from entry to exit. Without progress for `hang_seconds` the process ends with status 6.

    folder: of the run, on a file system that all ranks see. in_order: whether all ranks go through a step alike (no
    pipeline), so that the one that has done least of it is behind. record: called with the message by the one rank
    that speaks.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        world_size: int,
        hang_seconds: float,
        in_order: bool,
        record: Callable[[str], None],
    ) -> None:
        self._folder, self._rank, self._world_size = folder, rank, world_size
        self._hang_seconds, self._in_order, self._record = hang_seconds, in_order, record
        self._period = min(hang_seconds / _PERIODS, _LONGEST_PERIOD)
        self._done = threading.Event()
        self._peers: dict[int, Peer] = {}
        self._observed_since = time.monotonic()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._publish, self._watch)]

    def __enter__(self) -> Self:
        beat()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, LostRankError) and self._is_stale(0.8 * self._hang_seconds):
            time.sleep(
                4 * self._period
            )  # a peer's watchdog has ended it: this one is about to say the same, with names
        self._done.set()
        for thread in self._threads:
            thread.join(timeout=self._period)
        with contextlib.suppress(OSError):
            self._file(self._rank).unlink(missing_ok=True)  # not written yet in a run that ends at once
            (self._folder / BEATS_NAME).rmdir()  # by the last

    def _file(self, rank: int) -> Path:
        return self._folder / BEATS_NAME / f"rank-{rank}.json"

    def _is_stale(self, seconds: float) -> bool:
        return time.monotonic() - last_beat().seconds >= seconds

    def _publish(self) -> None:
        """Write the own beat; read those of the others once it is old."""
        tick = 0
        with contextlib.suppress(OSError):
            (self._folder / BEATS_NAME).mkdir(exist_ok=True)
        while not self._done.is_set():
            tick += 1
            own, line = last_beat(), ""
            with contextlib.suppress(OSError):
                age = round(time.monotonic() - own.seconds, 2)
                line = json.dumps(
                    {"tick": tick, "step": own.step, "count": own.count_in_step, "phase": own.phase, "age": age}
                )
                file = os.open(self._file(self._rank), os.O_WRONLY | os.O_CREAT, 0o644)
                try:
                    os.pwrite(file, line.ljust(_LINE_BYTES - 1).encode() + b"\n", 0)
                finally:
                    os.close(file)  # on a network file system others see it from now on
            if self._is_stale(self._hang_seconds / 2):
                self._observe()
            else:
                self._peers = {}
            self._done.wait(self._period)

    def _observe(self) -> None:
        now = time.monotonic()
        if not self._peers:
            self._observed_since = now
        found = dict(self._peers)
        for rank in range(self._world_size):
            with contextlib.suppress(OSError, ValueError, TypeError):
                values = json.loads(self._file(rank).read_bytes())
                old = found.get(rank)
                if old is None or old.tick != values["tick"]:
                    found[rank] = Peer(**values, changed=now)
        self._peers = found

    def _watch(self) -> None:
        ticked = time.monotonic()
        while not self._done.wait(self._period / 2):
            now = time.monotonic()
            if now - ticked > 4 * self._period:
                beat()  # this process did not run: the time was not its own
            ticked = now
            observed_long = now - self._observed_since > 3.5 * self._period
            if self._is_stale(self._hang_seconds) and observed_long and not self._another_gets_on(now):
                self._conclude()

    def _another_gets_on(self, now: float) -> bool:
        """Whether this rank waits for one that is busy by itself, such as the one that writes a large file."""
        others = (peer for rank, peer in dict(self._peers).items() if rank != self._rank)
        return any(
            peer.changed > self._observed_since and now - (peer.changed - peer.age) < self._hang_seconds
            for peer in others
        )

    def _conclude(self) -> None:
        """Dump the stacks; the speaker tells; all end. Nothing of it may keep the process alive."""
        leaving = threading.Thread(target=self._tell, daemon=True)
        leaving.start()
        leaving.join(timeout=10 + 4 * self._period)
        os._exit(LostRankError.exit_status)

    def _tell(self) -> None:
        peers, now = dict(self._peers), time.monotonic()
        alive = {rank for rank, peer in peers.items() if now - peer.changed < 3 * self._period} | {self._rank}
        speaks = speaker(alive) == self._rank
        message = explain_hang(
            peers, alive, world_size=self._world_size, seconds=self._hang_seconds, in_order=self._in_order
        )
        with contextlib.suppress(OSError):
            stacks = self._folder / STACKS
            stacks.mkdir(exist_ok=True)
            with open(stacks / f"rank-{self._rank}.txt", "w", encoding="utf-8") as stream:
                stream.write(f"{message}\nlast of this rank: {asdict(last_beat())}\n\n")
                stream.flush()
                faulthandler.dump_traceback(stream, all_threads=True)
            message += f"; stacks of the ranks that run: {stacks}"
        if speaks:
            print(f"error: {message}; start again with run.resume=auto", file=sys.stderr, flush=True)
            with contextlib.suppress(OSError):
                self._record(message)
        time.sleep(min(2.0, self._period) * (1 if speaks else 2))  # let the others dump theirs, and the speaker speak

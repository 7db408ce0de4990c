# SPDX-License-Identifier: Apache-2.0
"""A new folder written by one process: under its name it is whole, or it does not exist.

Files go into a hidden `.tmp-<name>-<id>` beside it, which is renamed once. Errors, Ctrl-C, SIGTERM and SIGHUP remove
it; only a kill that nothing survives leaves it, and the next attempt at the same name removes it then.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from lora_megatron.checkpoint.folder import fsync
from lora_megatron.errors import CheckpointError, ConfigError

_ENDINGS = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """The temporary to write into, which becomes `out` at the end of the block; missing parents are made.

    The block flushes its own files to the disk; the folder's entries are flushed here.

    Raises:
        ConfigError: `out` is a file or a folder with something in it.
        CheckpointError: the disk is full, read-only or gone, for any OSError of the block too.
    """
    require_new(out)
    final = out.resolve()  # a link to an empty folder stays a link
    made = [parent for parent in final.parents if not parent.exists()]
    temporary = final.parent / f".tmp-{final.name}-{uuid.uuid4().hex[:8]}"
    with _endings_raise():
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(final)
            temporary.mkdir()
            with _locked(temporary):
                yield temporary
                fsync(temporary)
                os.rename(temporary, final)
                fsync(final.parent)
        except BaseException as problem:
            with _endings_ignored():
                shutil.rmtree(temporary, ignore_errors=True)
                with contextlib.suppress(OSError):  # the first that somebody else uses meanwhile stays
                    for parent in made:
                        parent.rmdir()
            if isinstance(problem, OSError):
                reason = problem.strerror or str(problem)
                raise CheckpointError(
                    f"cannot write {out}: {reason}; free some space or choose another folder"
                ) from problem
            raise


def require_new(out: Path) -> None:
    """Raise ConfigError unless `out` is absent or an empty folder."""
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out} exists already; nothing is overwritten: move it away or choose another --out")
    except OSError as problem:
        raise CheckpointError(f"cannot write {out}: {problem.strerror}; choose another --out") from problem


def _remove_abandoned(final: Path) -> None:
    """Remove what a killed process left of the same folder; one still at work holds its lock."""
    for stale in final.parent.glob(f".tmp-{final.name}-????????"):
        with contextlib.suppress(OSError), _locked(stale):
            shutil.rmtree(stale, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises OSError (BlockingIOError) when another process does."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _endings_raise() -> Iterator[None]:
    """Let a request to end pass through the block as SystemExit with the shell's status, instead of ending at once."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    heard = [s for s in _ENDINGS if _is_main_thread() and signal.getsignal(s) is signal.SIG_DFL]
    for number in heard:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def _endings_ignored() -> Iterator[None]:
    """Nothing stops the cleaning up, an impatient second Ctrl-C neither."""
    numbers = (*_ENDINGS, signal.SIGINT) if _is_main_thread() else ()
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()

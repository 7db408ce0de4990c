# SPDX-License-Identifier: Apache-2.0
"""One job at a time in a run folder: an flock on `.lock`, which the kernel drops when its holder dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

from lora_megatron.errors import ConfigError

LOCK_NAME = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLock:
    """Held from construction until `release`, which also removes the file; makes the folder, which `key` named.

    `supported` is False on a file system that knows no locks; nothing is held there.

    Raises:
        ConfigError: another job holds it; names that job's process and host.
    """

    def __init__(self, folder: Path, *, key: str = "run.dir") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._key = folder / LOCK_NAME, key
        self.supported = True
        self._file = self._acquire(folder)
        with contextlib.suppress(OSError):  # on a full disk the lock holds all the same, it only names nobody
            os.truncate(self._file, 0)
            os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}".encode())

    def _acquire(self, folder: Path) -> int:
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_still(file, self._path):
                    return file
            except BlockingIOError:
                holder = os.read(file, 500).decode(errors="replace") or "another process"
                os.close(file)
                raise ConfigError(
                    f"{self._key} = {folder} is in use by {holder}: wait until that ends, or choose another {self._key}"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    os.close(file)
                    raise
                self.supported = False
                return file
            os.close(file)  # the holder removed it between our open and our lock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Let others in."""
        with contextlib.suppress(OSError):
            self._path.unlink()
        os.close(self._file)


def _is_still(file: int, path: Path) -> bool:
    """Whether the open file is what stands under its name."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False

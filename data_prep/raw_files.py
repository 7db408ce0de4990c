# SPDX-License-Identifier: Apache-2.0
"""Raw files as bounded streams: a progress bar over their bytes, lines of limited length, records that are bad."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import rich.progress
from rich.console import Console

from lora_megatron.errors import DataError

MAX_RECORD_BYTES = 4 * 2**20
"""Of one record as it stands in the file; a row of a prepared file is smaller still (lora_megatron.data.parquet)."""
BLOCK_BYTES = 2**16
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class BadRecord:
    """Stands in a stream of records where one cannot be read and the next one can."""

    reason: str
    path: Path | None = None
    """Where it is, if not in the file that the stream is of."""


@contextmanager
def open_raw(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, with a bar on stderr when that is a terminal. Raises DataError when it cannot be read."""
    try:
        with open(path, "rb") as stream:
            if not sys.stderr.isatty():
                yield stream
                return
            size, console = path.stat().st_size, Console(stderr=True)
            with rich.progress.wrap_file(stream, size, description=path.name, console=console) as watched:
                yield watched
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def read_lines(path: Path, *, longest: int = MAX_RECORD_BYTES) -> Iterator[tuple[int, str | BadRecord]]:
    """Yield (line number from 1, the line without its end), in memory of one line.

    A line of more than `longest` bytes or that is not UTF-8 comes as a BadRecord; so does what follows a lone \\r in no
    case: lines end with \\n or \\r\\n. A byte order mark at the beginning is dropped.
    """
    with open_raw(path) as stream:
        number = 0
        while raw := stream.readline(longest + 2):
            number += 1
            if number == 1:
                raw = raw.removeprefix(_BOM)
            line = raw.removesuffix(b"\n").removesuffix(b"\r")
            if len(line) > longest:
                while raw and not raw.endswith(b"\n"):
                    raw = stream.readline(BLOCK_BYTES)
                yield number, BadRecord(f"longer than {longest} bytes")
                continue
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                yield number, BadRecord(f"byte {error.start + 1} is not UTF-8")

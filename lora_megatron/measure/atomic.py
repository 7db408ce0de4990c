# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent: written beside their place under another name, flushed to disk, then renamed."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any


def write_bytes(path: Path, content: bytes) -> None:
    """Put `content` at `path`, replacing what is there in one step."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would keep the other users of a shared file system out
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Put `text` at `path` as UTF-8, replacing what is there in one step."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Put `value` at `path` as strict JSON: what is not finite becomes null."""
    write_text(path, json.dumps(finite_or_null(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_json_even_if_full(path: Path, value: Any) -> None:
    """`write_json`, or over the old content in place where there is no room for a second file.

    What is written in place may be torn by a kill; an old status that stays would be wrong for certain.
    """
    try:
        write_json(path, value)
    except OSError:
        with open(path, "r+b") as stream:
            stream.write((json.dumps(finite_or_null(value), allow_nan=False) + "\n").encode())
            stream.truncate()
            stream.flush()
            os.fsync(stream.fileno())


def finite_or_null(value: Any) -> Any:
    """The same JSON value with None for every NaN and infinity, which JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    return value

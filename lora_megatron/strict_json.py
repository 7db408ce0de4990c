# SPDX-License-Identifier: Apache-2.0
"""Read JSON and hash files without trusting them.

Python's reader accepts duplicate keys, NaN and Infinity; here they are errors, as are files too large to be what they
claim. Every complaint is one line that names the path, raised as the caller's kind of error.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_megatron.errors import UserError

MAX_JSON_BYTES = 64 * 2**20
_BLOCK = 8 * 2**20  # bytes hashed between two signs of progress


def file_sha256(path: Path, error: type[UserError], *, progress: Callable[[], None] = lambda: None) -> str:
    """SHA-256 of the file's content in hex, read in blocks, `progress` called after each.

    Raises `error` when it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
                progress()
        return digest.hexdigest()
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror}") from problem


def load_json_object(path: Path, what: str, error: type[UserError]) -> dict[str, Any]:
    """Read a JSON object strictly: UTF-8, no duplicate keys, no NaN or Infinity, at most 64 MiB.

    `what` is the phrase for error messages ("a data manifest"). Raises `error` naming the path.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise error(f"{path} is {size} bytes, too large for {what} (at most {MAX_JSON_BYTES})")
        value = parse_json(path.read_bytes().decode("utf-8"))
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror}; expected {what}") from problem
    except json.JSONDecodeError as problem:
        raise error(f"{path}:{problem.lineno} is not valid JSON ({problem.msg}); expected {what}") from problem
    except (UnicodeDecodeError, RecursionError) as problem:
        raise error(f"{path} is not valid JSON ({type(problem).__name__}); expected {what}") from problem
    except NotStrictJson as problem:
        raise error(f"{path} is not strict JSON: {problem}; expected {what}") from problem
    if not isinstance(value, dict):
        raise error(f"{path} holds a JSON {type(value).__name__}, expected {what} (an object)")
    return value


class NotStrictJson(Exception):
    """JSON that Python would read and the standard does not allow, or that says one thing twice."""


def parse_json(text: str) -> Any:
    """json.loads without duplicate keys, NaN, Infinity and huge numbers. Raises JSONDecodeError or NotStrictJson."""
    try:
        return json.loads(
            text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite_float
        )
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python refuses to read integers of thousands of digits
        raise NotStrictJson("it contains a number that is too long") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise NotStrictJson(f"key {twice!r} appears twice")
    return result


def _finite_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise NotStrictJson(f"it contains {digits[:20]}, which is too large a number")
    return value


def _refuse_constant(name: str) -> None:
    raise NotStrictJson(f"it contains {name}")

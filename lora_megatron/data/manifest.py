# SPDX-License-Identifier: Apache-2.0
"""The `manifest.json` beside prepared data: what it holds, how it is read, and the hash it is checked with.

The manifest is the last file a preparer writes, so a folder that has one is complete. It names every data file
with rows, bytes and SHA-256; readers compare all three, because neither Parquet's defaults nor a file system
reports a flipped bit.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_megatron.errors import DataError

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1
MAX_JSON_BYTES = 64 * 2**20


@dataclass(frozen=True)
class ManifestFile:
    """One data file as its manifest describes it: rows, size in bytes, SHA-256 in hex."""

    rows: int
    bytes: int
    sha256: str


def file_sha256(path: Path) -> str:
    """SHA-256 of the file's content in hex, read in blocks. Raises DataError when it cannot be read."""
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def load_json_object(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object strictly: UTF-8, no duplicate keys, no NaN or Infinity, at most 64 MiB.

    `what` is the phrase for error messages ("a data manifest"). Raises DataError naming the path.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise DataError(f"{path} is {size} bytes, too large for {what} (at most {MAX_JSON_BYTES})")
        text = path.read_bytes().decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; expected {what}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({type(error).__name__}); expected {what}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno} is not valid JSON ({error.msg}); expected {what}") from error
    except _NotStrictJson as error:
        raise DataError(f"{path} is not strict JSON: {error}; expected {what}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a JSON {type(value).__name__}, expected {what} (an object)")
    return value


def read_manifest(folder: Path) -> dict[str, ManifestFile] | None:
    """The data files that `folder`'s manifest names, or None when the folder has no manifest.

    Raises DataError when the manifest is damaged, of another schema version, or lacks a field.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    manifest = load_json_object(path, "a data manifest")
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise DataError(f"{path}: schema_version is {version!r}, this version reads {SCHEMA_VERSION}; prepare again")
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise DataError(f"{path}: 'files' is missing or not an object; prepare the data again")
    return {name: _manifest_file(path, name, entry) for name, entry in files.items()}


def _manifest_file(path: Path, name: str, entry: Any) -> ManifestFile:
    expected = {"rows": int, "bytes": int, "sha256": str}
    for field, kind in expected.items():
        # `type is`, not isinstance: JSON's true is an int to Python.
        if not isinstance(entry, dict) or type(entry.get(field)) is not kind:
            raise DataError(f"{path}: files[{name!r}] needs {field!r} ({kind.__name__}); prepare the data again")
    return ManifestFile(rows=entry["rows"], bytes=entry["bytes"], sha256=entry["sha256"])


class _NotStrictJson(Exception):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _NotStrictJson(f"key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return result


def _refuse_constant(name: str) -> None:
    raise _NotStrictJson(f"it contains {name}")

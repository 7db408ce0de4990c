# SPDX-License-Identifier: Apache-2.0
"""The `manifest.json` beside prepared data: what it holds, how it is read, and the hash it is checked with.

The manifest is the last file a preparer writes, so a folder that has one is complete; one without is refused. It
names every data file with rows, bytes and SHA-256; readers compare all three, because neither Parquet's defaults nor a
file system reports a flipped bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_megatron import strict_json
from lora_megatron.errors import DataError

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ManifestFile:
    """One data file as its manifest describes it: rows, size in bytes, SHA-256 in hex."""

    rows: int
    bytes: int
    sha256: str


def file_sha256(path: Path) -> str:
    """SHA-256 of a data file in hex. Raises DataError when it cannot be read."""
    return strict_json.file_sha256(path, DataError)


def load_json_object(path: Path, what: str) -> dict[str, Any]:
    """A JSON object read strictly; see `strict_json`. Raises DataError naming the path."""
    return strict_json.load_json_object(path, what, DataError)


def read_manifest(folder: Path) -> dict[str, ManifestFile]:
    """The data files that `folder`'s manifest names.

    Raises DataError when the manifest is missing, damaged, of another schema version, or lacks a field.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise DataError(
            f"{path} does not exist, so nothing tells whether the data beside it is whole: prepare the data again with "
            "`python -m data_prep`"
        )
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

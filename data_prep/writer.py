# SPDX-License-Identifier: Apache-2.0
"""Writes a prepared data set that is complete or absent, never half there.

Files go into a temporary folder beside the destination; after fsync and hashing, `manifest.json` is written last
and one rename makes the folder appear. A killed run leaves only a `.NAME.tmp-*` folder, which nothing reads.
The same rows give the same bytes: no timestamps, no paths of this machine, one fixed row-group size.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from lora_megatron.data.manifest import MANIFEST_NAME, SCHEMA_VERSION, file_sha256
from lora_megatron.errors import DataError

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("context", pa.string(), nullable=False),
        pa.field("target", pa.string(), nullable=False),
        pa.field("references", pa.list_(pa.field("element", pa.string(), nullable=False)), nullable=False),
        pa.field("split", pa.string(), nullable=False),
    ]
)
ROWS_PER_GROUP = 1024


class DatasetWriter:
    """A context manager around one prepared data set; leaving it without an error publishes `out`.

    out: the destination folder; it must not exist or be empty.
    preparer, options: recorded in the manifest, so that the same raw data can be prepared again.

    Raises DataError when `out` holds files or cannot be written.
    """

    def __init__(self, out: Path, *, preparer: str, options: Mapping[str, Any]) -> None:
        self.out = out
        self.rows: dict[str, int] = {}
        self.rejected = 0
        self._manifest: dict[str, Any] = {"preparer": preparer, "options": dict(options)}
        self._sources: dict[str, dict[str, Any]] = {}
        _refuse_non_empty(out)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.tmp-", dir=out.parent))
            self.folder.chmod(0o755)  # mkdtemp's 0700 would keep the other users of a shared file system out
        except OSError as error:
            raise DataError(f"cannot write into {out.parent}: {error.strerror}; choose another --out") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self._publish()
        except OSError as failure:
            raise DataError(f"cannot write {self.out}: {failure.strerror or failure}") from failure
        finally:
            # After a successful rename there is nothing left to remove.
            shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise DataError(f"cannot write {self.out}: {error.strerror or error}; is the disk full?") from error

    def add_source(self, path: Path) -> None:
        """Record a raw file's name, size and SHA-256 in the manifest."""
        self._sources[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}

    @contextmanager
    def split(self, name: str) -> Iterator[SplitWriter]:
        """Open `<name>.parquet`; the manifest lists it once the block ends without an error."""
        split = SplitWriter(self.folder / f"{name}.parquet", name)
        try:
            yield split
        finally:
            split.close()
        if split.rows == 0:
            raise DataError(f"the split {name!r} would have no rows; nothing is written to {self.out}")
        self.rows[name] = split.rows

    def _publish(self) -> None:
        files = {f"{name}.parquet": self._describe(name) for name in self.rows}
        manifest = {
            "schema_version": SCHEMA_VERSION,
            **self._manifest,
            "columns": {field.name: str(field.type) for field in SCHEMA},
            "files": files,
            "sources": self._sources,
            "rejected": self.rejected,
        }
        for path in sorted(self.folder.rglob("*")):
            _fsync(path)
        with open(self.folder / MANIFEST_NAME, "x", encoding="utf-8") as stream:
            stream.write(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        _fsync(self.folder)
        _refuse_non_empty(self.out)
        os.rename(self.folder, self.out)  # atomic; replaces an empty folder, fails on a non-empty one
        _fsync(self.out.parent)

    def _describe(self, name: str) -> dict[str, Any]:
        path = self.folder / f"{name}.parquet"
        return {"rows": self.rows[name], "bytes": path.stat().st_size, "sha256": file_sha256(path)}


class SplitWriter:
    """One Parquet file with page checksums, written in groups of 1024 rows."""

    def __init__(self, path: Path, split: str) -> None:
        self.rows = 0
        self._split = split
        self._pending: list[dict[str, Any]] = []
        self._writer = pq.ParquetWriter(path, SCHEMA, compression="zstd", write_page_checksum=True)

    def write(self, *, id: str, context: str, target: str, references: list[str]) -> None:
        """Append one example; `references` are all accepted texts for the context, `target` among them."""
        self._pending.append(
            {"id": id, "context": context, "target": target, "references": references, "split": self._split}
        )
        self.rows += 1
        if len(self._pending) == ROWS_PER_GROUP:
            self._flush()

    def close(self) -> None:
        """Write what is pending and the footer."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pa.Table.from_pylist(self._pending, schema=SCHEMA))
            self._pending.clear()


def _refuse_non_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} already exists and is not an empty folder; choose another --out or remove it")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

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
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from lora_megatron.data.manifest import MANIFEST_NAME, SCHEMA_VERSION, file_sha256
from lora_megatron.data.parquet import RENDERED_FOR
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
META = pa.field("meta", pa.string(), nullable=False)
"""JSON for scorers; a column of those data sets only that have it."""
ROWS_PER_GROUP = 1024
BYTES_PER_GROUP = 32 * 2**20
"""Of text: rows that are long come in smaller groups, so that memory stays bounded."""


class DatasetWriter:
    """A context manager around one prepared data set; leaving it without an error publishes `out`.

    out: the destination folder; it must not exist or be empty.
    preparer, options: recorded in the manifest, so that the same raw data can be prepared again.
    with_meta: rows have the column `meta` as well.
    rendered_for: the fingerprint of the tokenizer whose chat template rendered the texts.

    Raises DataError when `out` holds files or cannot be written.
    """

    def __init__(
        self,
        out: Path,
        *,
        preparer: str,
        options: Mapping[str, Any],
        with_meta: bool = False,
        rendered_for: str | None = None,
    ) -> None:
        self.out = out
        self._schema = SCHEMA.append(META) if with_meta else SCHEMA
        if rendered_for is not None:
            self._schema = self._schema.with_metadata({RENDERED_FOR: rendered_for.encode()})
        self.rows: dict[str, int] = {}
        self.rejected = 0
        self.left_out: Counter[str] = Counter()
        """Records that the data set's own rules leave out, by reason."""
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
        """Record a raw file's name, size and SHA-256 in the manifest; with its folder's where the name is taken."""
        name = path.name if path.name not in self._sources else f"{path.parent.name}/{path.name}"
        self._sources[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}

    @contextmanager
    def split(self, name: str) -> Iterator[SplitWriter]:
        """Open `<name>.parquet`; the manifest lists it once the block ends without an error."""
        split = SplitWriter(self.folder / f"{name}.parquet", name, self._schema)
        try:
            yield split
            split.close()
        except BaseException:
            split.abandon()
            raise
        if split.rows == 0:
            raise DataError(f"the split {name!r} would have no rows; nothing is written to {self.out}")
        self.rows[name] = split.rows

    def _publish(self) -> None:
        files = {f"{name}.parquet": self._describe(name) for name in self.rows}
        metadata = self._schema.metadata or {}
        manifest = {
            "schema_version": SCHEMA_VERSION,
            **self._manifest,
            "columns": {field.name: str(field.type) for field in self._schema},
            "files": files,
            "sources": self._sources,
            "rejected": self.rejected,
            **({"rendered_for": rendered_for.decode()} if (rendered_for := metadata.get(RENDERED_FOR)) else {}),
            **({"left_out": dict(self.left_out)} if self.left_out else {}),
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
    """One Parquet file with page checksums, written in groups of 1024 rows, or fewer long ones."""

    def __init__(self, path: Path, split: str, schema: pa.Schema = SCHEMA) -> None:
        self.rows = 0
        self._split, self._schema = split, schema
        self._pending: list[dict[str, Any]] = []
        self._pending_bytes = 0
        self._writer = pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)

    def write(self, *, id: str, context: str, target: str, references: list[str], meta: str | None = None) -> None:
        """Append one example; `references` are all accepted texts for the context, `target` among them."""
        row: dict[str, Any] = {"id": id, "context": context, "target": target, "references": references}
        row["split"] = self._split
        if META.name in self._schema.names:
            row[META.name] = meta
        self._pending.append(row)
        self._pending_bytes += sum(map(len, (context, target, meta or "", *references)))
        self.rows += 1
        if len(self._pending) == ROWS_PER_GROUP or self._pending_bytes >= BYTES_PER_GROUP:
            self._flush()

    def close(self) -> None:
        """Write what is pending and the footer."""
        self._flush()
        self._writer.close()

    def abandon(self) -> None:
        """Let go of the file after an error, which is what is to be told: closing may fail for the same reason."""
        with suppress(pa.ArrowException, OSError):
            self._writer.close()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pa.Table.from_pylist(self._pending, schema=self._schema))
            self._pending.clear()
            self._pending_bytes = 0


def _refuse_non_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} already exists and is not an empty folder; choose another --out or remove it")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

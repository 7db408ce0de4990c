# SPDX-License-Identifier: Apache-2.0
"""A prepared Parquet file as a checked, random-access table of (id, context, target).

A Parquet file is input from outside: its footer may lie about rows and sizes, its bytes may have rotted. So the
manifest's hash is compared before anything is decoded, page checksums are verified, text is decoded a few rows at a
time against limits, and every string is checked to be UTF-8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lora_megatron.data.manifest import MANIFEST_NAME, ManifestFile, file_sha256, read_manifest
from lora_megatron.data.tokenizer import Tokenizer
from lora_megatron.errors import DataError

MAX_ROW_BYTES = 2**20
MAX_TOTAL_BYTES = 4 * 2**30
MAX_EXPANSION = 1000  # text compresses 3 to 30 times; a file that claims far more is made to exhaust memory
MIN_TOTAL_BYTES = 64 * 2**20  # below this no file is refused for its expansion
_ROWS_PER_BATCH = 64  # bounds what one step decodes to 64 rows of the largest size allowed
_PAGE_OVERHEAD = 2**20  # headers, levels and dictionaries beside the text itself
RENDERED_FOR = b"lora_megatron.rendered_for"
"""Key of a file's metadata: the fingerprint of the tokenizer whose chat template rendered its texts."""
_MAGIC = b"PAR1"
_PREPARERS = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "csv --delimiter tab"}
_TEXT_COLUMNS = (("context", "target"), ("prompt", "completion"))


class ExampleTable:
    """Rows of one Parquet file, held as Arrow columns.

    path: the file; content_hash: its SHA-256 in hex, for ranks to compare; columns: the names that serve as
    context and target; rendered_for: the fingerprint of the tokenizer whose chat template rendered them, or None.
    """

    def __init__(
        self,
        path: Path,
        content_hash: str,
        columns: tuple[str, str],
        table: pa.Table,
        *,
        rendered_for: str | None = None,
    ) -> None:
        self.path = path
        self.rendered_for = rendered_for
        self.content_hash = content_hash
        self.columns = columns
        self._table = table

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> tuple[str, str, str]:
        """(id, context, target) of row `index`; the id is the row number where the file has no id column."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        context, target = (self._table.column(name)[index].as_py() for name in self.columns)
        row_id = self._table.column("id")[index].as_py() if "id" in self._table.column_names else str(index)
        return row_id, context, target

    def __iter__(self) -> Iterator[tuple[str, str, str]]:
        row = 0
        for batch in self._table.to_batches():
            columns = {
                name: batch.column(name).to_pylist() for name in (*self.columns, "id") if name in batch.schema.names
            }
            ids = columns.get("id") or [str(row + i) for i in range(batch.num_rows)]
            yield from zip(ids, columns[self.columns[0]], columns[self.columns[1]], strict=True)
            row += batch.num_rows

    def first(self, count: int) -> ExampleTable:
        """A table of the first `count` rows, or of all where there are fewer."""
        head = self._table.slice(0, count)
        return ExampleTable(self.path, self.content_hash, self.columns, head, rendered_for=self.rendered_for)

    @property
    def rendered(self) -> bool:
        """Whether a chat template rendered the texts: their special tokens and line ends are its own."""
        return self.rendered_for is not None

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise DataError when a chat template rendered the texts for another tokenizer: its tokens would be text."""
        if self.rendered_for not in (None, tokenizer.fingerprint):
            raise DataError(
                f"{self.path} was rendered by the chat template of another tokenizer than {tokenizer.name!r}: "
                "prepare it again with --chat-template of this one, or use that one"
            )

    def references(self, index: int) -> list[str]:
        """All accepted texts for row `index`: its `references` column, or its target alone without one."""
        if "references" not in self._table.column_names:
            return [self[index][2]]
        return self._table.column("references")[index].as_py()

    def meta(self, index: int) -> str | None:
        """What scorers know of row `index` besides: JSON from its `meta` column, None without one."""
        return self._table.column("meta")[index].as_py() if "meta" in self._table.column_names else None


def open_examples(path: str | Path, *, with_references: bool = False) -> ExampleTable:
    """Open and check a Parquet file with the columns context and target (or prompt and completion).

    with_references: also decode the columns `references` and `meta` where there are any (evaluation needs them,
    training does not).

    Raises DataError when the file is missing, a folder, not Parquet, empty, damaged, without a manifest beside it or
    different from what that says, lacks the columns, or holds nulls, invalid UTF-8, a row above 1 MiB, or decodes to
    more than 4 GiB or 1000 times its size.
    """
    path = Path(path)
    _require_parquet(path)
    content_hash = file_sha256(path)
    entry = _check_manifest(path, content_hash)
    with _arrow_errors(path), pq.ParquetFile(path, memory_map=True, page_checksum_verification=True) as file:
        columns = _text_columns(path, file.schema_arrow)
        if entry.rows != file.metadata.num_rows:
            raise DataError(
                f"{path} has {file.metadata.num_rows} rows, {MANIFEST_NAME} says {entry.rows}; prepare the data again"
            )
        optional = ["id", "references", "meta"] if with_references else ["id"]
        names = [*columns, *(name for name in optional if name in file.schema_arrow.names)]
        _check_claimed_sizes(path, file.metadata, names)
        table = _read_capped(path, file, names)
        rendered_for = (file.schema_arrow.metadata or {}).get(RENDERED_FOR)
    if table.num_rows == 0:
        raise DataError(f"{path} has no rows; prepare the data again or give another file")
    fingerprint = None if rendered_for is None else rendered_for.decode("utf-8", errors="replace")
    return ExampleTable(path, content_hash, columns, table, rendered_for=fingerprint)


def _require_parquet(path: Path) -> None:
    """Raise DataError for what is another kind of file, before anything is asked of a manifest that it never had."""
    if path.is_dir():
        inside = sorted(entry.name for entry in path.glob("*.parquet"))
        remedy = (
            f"name one of its files: {', '.join(inside)}" if inside else "no file in it is a prepared .parquet file"
        )
        raise DataError(f"{path} is a folder; {remedy}")
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file; give the path of a prepared .parquet file")
    with open(path, "rb") as file:
        start = file.read(len(_MAGIC))
    if start == _MAGIC or path.suffix == ".parquet":  # a damaged one: the manifest knows what it was
        return
    if not start:
        raise DataError(f"{path} is empty; give the path of a prepared .parquet file")
    preparer = _PREPARERS.get(path.suffix.lower())
    command = f"python -m data_prep {preparer} --raw {path} --out DIR" if preparer else "python -m data_prep"
    raise DataError(f"{path} is no Parquet file: `{command}` makes what is read here")


def _check_manifest(path: Path, content_hash: str) -> ManifestFile:
    files = read_manifest(path.parent)
    if path.name not in files:
        raise DataError(f"{path} is not listed in the {MANIFEST_NAME} beside it; move it elsewhere or prepare again")
    entry = files[path.name]
    size = path.stat().st_size
    if size != entry.bytes:
        raise DataError(f"{path} has {size} bytes, {MANIFEST_NAME} says {entry.bytes}; copy or prepare it again")
    if content_hash != entry.sha256:
        raise DataError(f"{path} differs from the SHA-256 in {MANIFEST_NAME}: damaged; copy or prepare it again")
    return entry


def _text_columns(path: Path, schema: pa.Schema) -> tuple[str, str]:
    for names in _TEXT_COLUMNS:
        if all(schema.names.count(name) == 1 for name in names):
            break
    else:
        raise DataError(f"{path} has the columns {schema.names}; expected context and target (or prompt, completion)")
    for name in ("id", "references", "meta", *names):
        kind = schema.field(name).type if name in schema.names else pa.string()
        element = kind.value_type if name == "references" and pa.types.is_list(kind) else kind
        if not (pa.types.is_string(element) or pa.types.is_large_string(element)):
            raise DataError(f"{path}: column {name!r} is {kind}, expected string")
    return names


def _check_claimed_sizes(path: Path, metadata: pq.FileMetaData, names: Sequence[str]) -> None:
    """Refuse by the footer's own numbers before a page is decompressed: a page may be far larger than a batch."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            name, size = column.path_in_schema.split(".")[0], column.total_uncompressed_size
            if name in names and size > min(group.num_rows * MAX_ROW_BYTES + _PAGE_OVERHEAD, MAX_TOTAL_BYTES):
                raise DataError(
                    f"{path}: column {name!r} has {size} bytes for {group.num_rows} rows; "
                    f"at most {MAX_ROW_BYTES} per row and {MAX_TOTAL_BYTES} in all"
                )


def _read_capped(path: Path, file: pq.ParquetFile, names: Sequence[str]) -> pa.Table:
    """Decode `names` a few rows at a time, so that a small file cannot ask for unbounded memory."""
    batches: list[pa.RecordBatch] = []
    rows = total = 0
    size = path.stat().st_size
    limit = min(MAX_TOTAL_BYTES, max(MIN_TOTAL_BYTES, MAX_EXPANSION * size))
    for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=list(names)):
        batch.validate(full=True)  # UTF-8 and offsets
        for name in names:
            if batch.column(name).null_count:
                null_row = rows + batch.column(name).is_null().to_pylist().index(True)
                raise DataError(f"{path}: row {null_row} has a null {name!r}; every row needs one")
        total += batch.nbytes
        # Cheap test first; only a batch that could hold an oversized row is looked at row by row.
        if batch.nbytes > MAX_ROW_BYTES:
            for i in range(batch.num_rows):
                if batch.slice(i, 1).nbytes > MAX_ROW_BYTES:
                    raise DataError(f"{path}: row {rows + i} is larger than {MAX_ROW_BYTES} bytes; shorten or drop it")
        if total > limit:
            raise DataError(f"{path} ({size} bytes) decodes to more than {limit} bytes; split it, or it is hostile")
        batches.append(batch)
        rows += batch.num_rows
    if rows != file.metadata.num_rows:
        raise DataError(f"{path} holds {rows} rows, its footer says {file.metadata.num_rows}: damaged; prepare again")
    # One chunk per column: random access in a table of many chunks would search them at every row.
    return pa.Table.from_batches(batches, schema=_projected(file.schema_arrow, names)).combine_chunks()


def _projected(schema: pa.Schema, names: Sequence[str]) -> pa.Schema:
    return pa.schema([schema.field(name) for name in names])


@contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    """Turn what Arrow raises for damaged or hostile files into one DataError line."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} cannot be read as Parquet: {reason}; copy or prepare it again") from error

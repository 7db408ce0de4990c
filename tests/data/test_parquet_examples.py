# SPDX-License-Identifier: Apache-2.0
"""Reading prepared Parquet: what is accepted, and that damaged or hostile files end as one DataError."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.writer import DatasetWriter
from lora_megatron.data.manifest import file_sha256
from lora_megatron.data.parquet import open_examples
from lora_megatron.errors import DataError
from tests.data.manifests import vouch_for

ROWS = [(str(i), f"name : A{i}", f"Täxt {i}.") for i in range(300)]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A prepared data set's train.parquet, with its manifest."""
    with DatasetWriter(tmp_path / "set", preparer="test", options={}) as writer, writer.split("train") as split:
        for row_id, context, target in ROWS:
            split.write(id=row_id, context=context, target=target, references=[target, "other"])
    return tmp_path / "set" / "train.parquet"


def write(path: Path, columns: dict[str, object], **options: object) -> Path:
    pq.write_table(pa.table(columns), path, write_page_checksum=True, **options)
    return vouch_for(path)


def test_rows_in_order_by_iteration_and_index(prepared: Path) -> None:
    table = open_examples(prepared)
    assert list(table) == ROWS
    assert [table[i] for i in range(len(table))] == ROWS
    assert table.content_hash == file_sha256(prepared)
    with pytest.raises(IndexError):
        table[len(table)]


def test_references_only_where_asked_for(prepared: Path) -> None:
    assert open_examples(prepared, with_references=True).references(7) == ["Täxt 7.", "other"]
    assert open_examples(prepared).references(7) == ["Täxt 7."]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_prompt_and_completion_without_id(kind: pa.DataType, tmp_path: Path) -> None:
    columns = {"completion": pa.array(["x", "y"], kind), "prompt": pa.array(["", "q"], kind), "score": [1, 2]}
    table = open_examples(write(tmp_path / "a.parquet", columns))
    assert list(table) == [("0", "", "x"), ("1", "q", "y")]


def test_every_flipped_bit_is_found_by_the_manifest(prepared: Path) -> None:
    raw = prepared.read_bytes()
    for position in range(0, len(raw), 41):
        damaged = bytearray(raw)
        damaged[position] ^= 1 << (position % 8)
        prepared.write_bytes(damaged)
        with pytest.raises(DataError, match=r"SHA-256 in manifest\.json"):
            open_examples(prepared)


def test_a_flipped_bit_never_changes_text_even_if_the_manifest_agrees(prepared: Path) -> None:
    raw = prepared.read_bytes()
    found = 0
    for position in range(0, len(raw), 7):
        damaged = bytearray(raw)
        damaged[position] ^= 1 << (position % 8)
        prepared.write_bytes(damaged)
        vouch_for(prepared, rows=len(ROWS))
        try:
            rows = list(open_examples(prepared))
        except DataError:
            found += 1
        else:
            assert rows == ROWS  # the bit was in a column, statistic or note that is not read
    assert found > len(raw) // 7 // 4


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_truncated_files(keep: int, prepared: Path) -> None:
    prepared.write_bytes(prepared.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"manifest\.json says"):
        open_examples(prepared)
    vouch_for(prepared)
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        open_examples(prepared)


def test_a_manifest_that_is_missing(prepared: Path) -> None:
    (prepared.parent / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"manifest\.json does not exist.*prepare the data again with `python -m"):
        open_examples(prepared)


def edit_entry(**values: object) -> Callable[[dict], None]:
    return lambda manifest: manifest["files"]["train.parquet"].update(values)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edit_entry(rows=299), "has 300 rows, manifest.json says 299"),
        (edit_entry(bytes=1), "manifest.json says 1"),
        (edit_entry(sha256="0" * 64), "differs from the SHA-256"),
        (edit_entry(rows="300"), "needs 'rows'"),
        (edit_entry(rows=True), "needs 'rows'"),
        (lambda manifest: manifest.update(schema_version=2), "schema_version is 2"),
        (lambda manifest: manifest.update(files=[]), "'files' is missing"),
        (lambda manifest: manifest["files"].clear(), "not listed in the manifest"),
    ],
)
def test_a_manifest_that_lies(edit: Callable[[dict], None], message: str, prepared: Path) -> None:
    path = prepared.parent / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=message):
        open_examples(prepared)


@pytest.mark.parametrize("content", ["", "{", '{"a": 1, "a": 2}', '{"a": Infinity}', "[]", "\ud800"])
def test_a_damaged_manifest(content: str, prepared: Path) -> None:
    (prepared.parent / "manifest.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match=r"manifest\.json"):
        open_examples(prepared)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"]}, "expected context and target"),
        ({"context": ["a"]}, "expected context and target"),
        ({"context": [1], "target": ["a"]}, "column 'context' is int64, expected string"),
        ({"context": [["a"]], "target": ["a"]}, "expected string"),
        ({"context": ["a", "b"], "target": ["a", None]}, "row 1 has a null 'target'"),
        ({"context": pa.array([], pa.string()), "target": pa.array([], pa.string())}, "has no rows"),
        ({"context": ["a"], "target": ["b"], "id": [1]}, "column 'id' is int64"),
    ],
)
def test_wrong_columns(columns: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        open_examples(write(tmp_path / "a.parquet", columns))


def test_what_is_no_parquet_file_is_called_what_it_is(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    for name, content in (
        ("own.jsonl", b'{"text": "a"}\n'),
        ("own.TSV", b"a\tb\n"),
        ("own.txt", b"a"),
        ("none.csv", b""),
    ):
        (tmp_path / name).write_bytes(content)
    for path, says in (
        (tmp_path / "absent.parquet", "does not exist or is not a file"),
        (tmp_path / "nothing", "is a folder; no file in it is a prepared .parquet file"),
        (prepared.parent, f"is a folder; name one of its files: {prepared.name}"),
        (
            tmp_path / "own.jsonl",
            f"`python -m data_prep jsonl --raw {tmp_path}/own.jsonl --out DIR` makes what is read",
        ),
        (tmp_path / "own.TSV", f"`python -m data_prep csv --delimiter tab --raw {tmp_path}/own.TSV --out DIR`"),
        (tmp_path / "own.txt", "is no Parquet file: `python -m data_prep` makes"),
        (tmp_path / "none.csv", "is empty; give the path of a prepared .parquet file"),
    ):
        with pytest.raises(DataError) as caught:
            open_examples(path)
        assert str(path) in str(caught.value)
        assert says in str(caught.value)


def test_invalid_utf8(tmp_path: Path) -> None:
    # Arrow takes the bytes on trust when a string array is built from buffers.
    offsets = pa.py_buffer((0).to_bytes(4, "little") + (2).to_bytes(4, "little"))
    text = pa.StringArray.from_buffers(1, offsets, pa.py_buffer(b"\xc3\x28"))
    with pytest.raises(DataError, match="UTF8"):
        open_examples(write(tmp_path / "a.parquet", {"context": text, "target": ["x"]}))


@pytest.mark.parametrize(
    ("rows", "size", "dictionary", "message"),
    [
        (3, 2**20 + 1, True, "row 0 is larger than|bytes for 3 rows"),
        (1, 2**24, False, "bytes for 1 rows"),
        (400, 2**18, True, "decodes to more than 67108864 bytes"),
    ],
)
def test_small_files_that_decode_to_much(rows: int, size: int, dictionary: bool, message: str, tmp_path: Path) -> None:
    path = write(
        tmp_path / "bomb.parquet",
        {"context": ["a" * size] * rows, "target": ["b"] * rows},
        compression="zstd",
        use_dictionary=dictionary,
    )
    assert path.stat().st_size < 20_000
    with pytest.raises(DataError, match=message):
        open_examples(path)

# SPDX-License-Identifier: Apache-2.0
"""The E2E preparer: parsing, hostile CSV files, and that a data set is complete or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.__main__ import PREPARERS, main
from data_prep.e2e import linearise, parse_mr
from data_prep.writer import DatasetWriter
from lora_megatron.data.manifest import file_sha256
from lora_megatron.data.parquet import open_examples
from lora_megatron.errors import DataError

E2E = Path(__file__).parents[2].parent / "shared" / "data" / "e2e"
GOOD = 'mr,ref\n"name[A], area[x, y]",One.\n"name[A], area[x, y]",Two.\nname[B],Three.\n'

slots = st.from_regex(r"\A[A-Za-z][A-Za-z0-9_]{0,10}( [a-z]{1,5})?\Z")
values = (
    st.text(st.characters(exclude_characters="[]|\r\n", exclude_categories=["Cs"]), min_size=1, max_size=20)
    .map(str.strip)
    .filter(bool)
)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "trainset.csv").write_text(GOOD, encoding="utf-8")
    return folder


def prepare(raw: Path, out: Path, *flags: str) -> int:
    return main(["e2e", "--raw", str(raw), "--out", str(out), *flags])


@given(st.lists(st.tuples(slots, values), min_size=1, max_size=8))
def test_any_slot_value_list_survives_parsing(pairs: list[tuple[str, str]]) -> None:
    assert parse_mr(", ".join(f"{slot}[{value}]" for slot, value in pairs)) == pairs


@given(st.text(max_size=60))
def test_parsing_arbitrary_text_returns_pairs_or_says_where(text: str) -> None:
    message, pairs = "", []
    try:
        pairs = parse_mr(text)
    except ValueError as error:
        message = str(error)
    assert bool(pairs) != ("at character" in message)
    assert all(slot and value for slot, value in pairs)


@pytest.mark.parametrize(
    "mr", ["", "name", "name[]", "name[ ]", "name[A],area[B]", "name[A], ", "name[A", "name[A[B]]", "[A]", "name[A] x"]
)
def test_malformed_mr_is_refused(mr: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_mr(mr)


def test_values_keep_commas_and_currency() -> None:
    pairs = parse_mr("name[The Vaults], priceRange[more than £30, or so], customer rating[5 out of 5]")
    assert linearise(pairs) == "name : The Vaults | priceRange : more than £30, or so | customer rating : 5 out of 5"


def test_rows_references_and_manifest(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert prepare(raw, out) == 0
    rows = pq.read_table(out / "train.parquet").to_pylist()
    assert [row["target"] for row in rows] == ["One.", "Two.", "Three."]
    assert rows[0]["context"] == "name : A | area : x, y"
    assert rows[1]["references"] == ["One.", "Two."]
    assert {row["split"] for row in rows} == {"train"}
    manifest = json.loads((out / "manifest.json").read_text())
    entry = manifest["files"]["train.parquet"]
    assert entry["rows"] == 3
    assert entry["sha256"] == file_sha256(out / "train.parquet")
    assert manifest["sources"]["trainset.csv"]["sha256"] == file_sha256(raw / "trainset.csv")


def test_same_raw_data_gives_the_same_bytes(raw: Path, tmp_path: Path) -> None:
    assert prepare(raw, tmp_path / "a") == prepare(raw, tmp_path / "b") == 0
    for name in ("train.parquet", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_limit_bounds_every_split(raw: Path, tmp_path: Path) -> None:
    assert prepare(raw, tmp_path / "out", "--limit", "2") == 0
    assert len(open_examples(tmp_path / "out" / "train.parquet")) == 2
    assert prepare(raw, tmp_path / "other", "--limit", "0") == 2


HOSTILE = {
    "bad utf-8": (b"mr,ref\nname[A],ok\nname[B],caf\xe9\n", "trainset.csv:3: byte 12 is not UTF-8"),
    "bad mr": (b"mr,ref\nname[A],ok\nname A,no\n", "trainset.csv:3: expected slot[value] at character 1"),
    "line after a multi-line record": (b'mr,ref\nname[A],"two\nlines"\nname[,no\n', "trainset.csv:4: expected slot"),
    "empty ref": (b"mr,ref\nname[A],\n", "trainset.csv:2: ref is empty"),
    "wrong header": (b"meaning,text\nname[A],ok\n", "trainset.csv:1: the header is"),
    "extra field": (b"mr,ref\nname[A], area[B],no quotes\n", "trainset.csv:2: 3 fields, the header has 2"),
    "open quote": (b'mr,ref\nname[A],"never closed\n', "not valid CSV"),
    "empty file": (b"", "is empty"),
    "header only": (b"mr,ref\n", "would have no rows"),
    "endless line": (b"mr,ref\n" + b"x" * (2**20 + 1), "trainset.csv:2: longer than"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_csv_ends_with_file_and_line_and_leaves_nothing(
    case: str, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = HOSTILE[case]
    (raw / "trainset.csv").write_bytes(content)
    assert prepare(raw, tmp_path / "out") == 3
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["raw"]


def test_reject_budget(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (raw / "trainset.csv").write_text(GOOD + "bad,Four.\nworse,Five.\n", encoding="utf-8")
    assert prepare(raw, tmp_path / "one", "--max-rejected", "1") == 3
    assert "trainset.csv:6" in capsys.readouterr().err
    assert prepare(raw, tmp_path / "two", "--max-rejected", "2") == 0
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["rejected"] == 2
    assert prepare(raw, tmp_path / "three", "--max-rejected", "-1") == 2


def test_missing_files_and_non_empty_out(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(tmp_path / "absent", tmp_path / "out") == 3
    assert "has none of trainset.csv" in capsys.readouterr().err
    out = tmp_path / "full"
    out.mkdir()
    (out / "keep").write_text("mine")
    assert prepare(raw, out) == 3
    assert "choose another --out" in capsys.readouterr().err
    assert os.listdir(out) == ["keep"]
    out = tmp_path / "empty"
    out.mkdir()
    assert prepare(raw, out) == 0


def test_failure_before_the_rename_leaves_nothing(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data_prep.writer.os.rename", full_disk)
    assert prepare(raw, tmp_path / "out") == 3
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["raw"]


def write_one_row(out: Path, afterwards: Callable[[], None]) -> None:
    with DatasetWriter(out, preparer="x", options={}) as writer:
        with writer.split("train") as rows:
            rows.write(id="0", context="c", target="t", references=["t"])
        afterwards()


def test_an_interrupt_publishes_nothing(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_one_row(tmp_path / "out", interrupt)
    assert os.listdir(tmp_path) == []


def test_an_output_appearing_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def another_run() -> None:
        out.mkdir()
        (out / "other").write_text("x")

    with pytest.raises(DataError, match="already exists"):
        write_one_row(out, another_run)
    assert os.listdir(out) == ["other"]


def test_unknown_preparer_names_the_valid_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["e2f"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert all(name in error for name in PREPARERS)


@pytest.mark.skipif(not E2E.is_dir(), reason="the E2E challenge files are not in ../shared/data")
def test_the_published_files(tmp_path: Path) -> None:
    assert prepare(E2E, tmp_path / "out") == 0
    validation = open_examples(tmp_path / "out" / "validation.parquet", with_references=True)
    assert len(validation) == 4672
    assert validation[0][1:] == (
        "name : Alimentum | area : city centre | familyFriendly : no",
        "There is a place in the city centre, Alimentum, that is not family-friendly.",
    )
    assert len({context for _, context, _ in validation}) == 547
    test = open_examples(tmp_path / "out" / "test.parquet", with_references=True)
    assert len(test) == 4693
    assert all(test[i][2] in test.references(i) for i in range(0, len(test), 97))

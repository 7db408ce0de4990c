# SPDX-License-Identifier: Apache-2.0
"""WikiSQL, MNLI, SAMSum, DART and WebNLG from small files in their published formats, and what they become."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.samsum import join_utterances
from lora_megatron.data.parquet import open_examples
from tests.data.raw_samples import GOOD, PAIR, QUESTION, TABLE, TALK, XML, lines, prepare, rows

WIKISQL = {".jsonl": lines(QUESTION), ".tables.jsonl": lines(TABLE)}
SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def test_wikisql_row(tmp_path: Path) -> None:
    assert prepare("wikisql", tmp_path, GOOD["wikisql"]) == 0
    (row,) = rows(tmp_path)
    assert row["context"] == 'columns: State | No. | Notes\nquestion: Who said "no" in São Tomé — عربي e\u0301 😀 ?'
    assert row["target"] == "SELECT COUNT(Notes) FROM table WHERE State = SOUTH 'X' AND No. > 4.5"
    sql = QUESTION["sql"]
    assert isinstance(sql, dict)
    expected = {"table_id": "1-10-1", "header": TABLE["header"], "types": TABLE["types"], **sql}
    assert json.loads(row["meta"]) == expected
    assert len(open_examples(tmp_path / "out" / "train.parquet", with_references=True)) == 1


def test_wikisql_keeps_the_tables_cells_where_queries_are_executed(tmp_path: Path) -> None:
    files = {f"{name}{end}": data for name in ("train", "dev") for end, data in WIKISQL.items()}
    assert prepare("wikisql", tmp_path, files) == 0
    train, validation = (json.loads(rows(tmp_path, split)[0]["meta"]) for split in ("train", "validation"))
    assert "rows" not in train
    assert validation == {**train, "rows": TABLE["rows"]}


@pytest.mark.parametrize("cells", [None, [["a", 1]], ["abc"], [["a", 1, True]], [["a", [], "b"]], [["a", 1, "\ud800"]]])
def test_wikisql_cells_that_are_none_are_refused(
    cells: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"dev.jsonl": WIKISQL[".jsonl"], "dev.tables.jsonl": lines({**TABLE, "rows": cells})}
    assert prepare("wikisql", tmp_path, files) == 3
    assert "dev.tables.jsonl:1: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_mnli_from_its_release_and_from_glue_are_the_same(tmp_path: Path) -> None:
    unlabelled = {**PAIR, "pairID": "2", "gold_label": "-"}
    release = {"multinli_1.0_train.jsonl": lines(PAIR, unlabelled), "multinli_1.0_dev_mismatched.jsonl": lines(PAIR)}
    assert prepare("mnli", tmp_path / "a", release) == 0
    header = ["index", "pairID", "sentence1", "sentence2", "label1", "gold_label"]
    quoted = ["0", "1e", "It rained.", "It was wet.", "x", "entailment"]
    glue = "\r\n".join("\t".join(fields) for fields in (header, quoted)).encode()
    assert prepare("mnli", tmp_path / "b", {"train.tsv": b"\xef\xbb\xbf" + glue}) == 0
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert rows(tmp_path / "a")[0]["context"] == "premise: It rained.\nhypothesis: It was wet."
    assert rows(tmp_path / "a", "validation_mismatched")[0]["target"] == "entailment"
    assert json.loads((tmp_path / "a" / "out" / "manifest.json").read_text())["left_out"] == {"without a gold label": 1}


def test_a_quote_in_glue_is_a_character(tmp_path: Path) -> None:
    text = 'pairID\tsentence1\tsentence2\tgold_label\n1\t"Open.\tShut" .\tneutral\n2\tb\tc\tneutral\n'
    assert prepare("mnli", tmp_path, {"dev_matched.tsv": text.encode()}) == 0
    assert rows(tmp_path, "validation")[0]["context"] == 'premise: "Open.\nhypothesis: Shut" .'


def test_samsum_prompt_is_the_papers(tmp_path: Path) -> None:
    assert prepare("samsum", tmp_path, GOOD["samsum"]) == 0
    (row,) = rows(tmp_path)
    assert row["context"] + "\n" == "A: Hi\nB: Hello\nA: 😀\n\n"  # a prompt gets one line end of its own
    assert (row["id"], row["target"]) == ("13", "A greets B.")
    assert join_utterances("a\rb\n\nc") == "a\nb\nc"


def test_dart_rows_have_all_sentences(tmp_path: Path) -> None:
    assert prepare("dart", tmp_path, GOOD["dart"]) == 0
    found = rows(tmp_path)
    assert [row["target"] for row in found] == ["One.", "Two."]
    assert all(row["references"] == ["One.", "Two."] for row in found)
    assert found[0]["context"] == "A | R | B && A | S | C"
    assert [row["id"] for row in found] == ["train-000000-0", "train-000000-1"]


def test_webnlg_test_set_by_seen_and_unseen(tmp_path: Path) -> None:
    files = {
        "train/1triples/a.xml": XML.format(category="Airport").encode(),
        "test/testdata_with_lex.xml": XML.format(category="Airport").replace("</entries></benchmark>\n", "").encode()
        + XML.format(category="Artist").partition("<benchmark><entries>")[2].encode(),
        "test/testdata_no_lex.xml": b"never read",
    }
    assert prepare("webnlg", tmp_path, files) == 0
    everything, seen, unseen = (rows(tmp_path, split) for split in ("test", "test_seen", "test_unseen"))
    assert [json.loads(row["meta"])["category"] for row in everything] == ["Airport", "Artist"]
    assert [[row["id"] for row in part] for part in (seen, unseen)] == [["Airport/1/Id1-0"], ["Artist/1/Id1-0"]]
    assert everything[0]["context"] == 'A | p | "B & Söhne"'
    assert everything[0]["references"] == ["A is <B> é."]


@pytest.mark.parametrize("task", GOOD)
def test_same_raw_data_gives_the_same_bytes(task: str, tmp_path: Path) -> None:
    assert prepare(task, tmp_path, GOOD[task]) == prepare(task, tmp_path, GOOD[task], out="again") == 0
    for name in ("train.parquet", "manifest.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def many(count: int) -> dict[str, bytes]:
    pairs = [{**PAIR, "pairID": str(i), "sentence1": f"Sentence {i}."} for i in range(count)]
    return {"multinli_1.0_train.jsonl": b"{bad\n" + lines(*pairs), "multinli_1.0_dev_matched.jsonl": lines(*pairs[:30])}


def test_low_data_subsets_are_drawn_by_seed_and_nest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--max-rejected", "1", "--low-data")
    drawn = {}
    for name, count, seed in (("a", "20", "1"), ("b", "20", "1"), ("c", "60", "1"), ("d", "20", "2")):
        assert prepare("mnli", tmp_path, many(200), *flags, count, "--seed", seed, out=name) == 0
        drawn[name] = [row["id"] for row in rows(tmp_path, out=name)]
        assert len(rows(tmp_path, "validation", name)) == 30  # the full validation set, as in the paper
    assert capsys.readouterr().err.count("rejected") == 4  # once a run, though it reads twice
    assert drawn["a"] == drawn["b"] != drawn["d"]
    assert len(set(drawn["a"])) == 20
    assert set(drawn["a"]) < set(drawn["c"])
    assert drawn["a"] == sorted(drawn["a"], key=int)  # in the order of the file
    assert prepare("mnli", tmp_path, many(200), *flags, "201", out="e") == 3
    assert "asks for more rows than the 200" in capsys.readouterr().err
    assert prepare("mnli", tmp_path, many(200), "--seed", "1", out="f") == 2


def test_lengths_and_truncations_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare("dart", tmp_path, GOOD["dart"], "--tokenizer", "bytes", "--sequence-length", "26", out="a") == 0
    # "A | R | B && A | S | C\n", "One." or "Two." and the end: 28 tokens, where a row holds 27
    assert "2 rows  56 tokens, 2 rows truncated at 26" in capsys.readouterr().out
    assert prepare("dart", tmp_path, GOOD["dart"], "--tokenizer", "bytes", "--sequence-length", "27", out="b") == 0
    assert "56 tokens, 0 rows truncated at 27" in capsys.readouterr().out
    assert prepare("dart", tmp_path, GOOD["dart"], out="c") == 0
    assert "2 rows  52 bytes" in capsys.readouterr().out
    assert prepare("dart", tmp_path, GOOD["dart"], "--sequence-length", "27", out="d") == 2


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published files are not in ../shared/data")
@pytest.mark.parametrize(("task", "expected"), [("dart", 6980), ("webnlg", 2258)])
def test_the_published_files(task: str, expected: int, tmp_path: Path) -> None:
    assert main([task, "--raw", str(SHARED / task), "--out", str(tmp_path / "out")]) == 0
    validation = open_examples(tmp_path / "out" / "validation.parquet", with_references=True)
    assert len(validation) == expected
    assert all(validation[i][2] in validation.references(i) for i in range(0, expected, 97))


def peak_of_preparing(task: str, name: str, records: int, tmp_path: Path) -> int:
    """Bytes of Python objects at their most, over a file of 3 kB a record. Arrow gets a group of rows at a time."""
    folder = tmp_path / f"{task}{records}"
    folder.mkdir()
    with open(folder / name, "w", encoding="utf-8") as stream:
        for i in range(records):
            record = {**TALK, "id": str(i), "dialogue": f"A: {i} " + "word " * 600}
            pair = {**PAIR, "pairID": str(i), "sentence1": f"{i} " + "word " * 600}
            stream.write(
                ("[" if i == 0 else ",\n") + json.dumps(record) if task == "samsum" else json.dumps(pair) + "\n"
            )
        stream.write("]" if task == "samsum" else "")

    tracemalloc.start()
    try:
        assert main([task, "--raw", str(folder), "--out", str(folder / "out")]) == 0
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("task", "name"), [("samsum", "train.json"), ("mnli", "multinli_1.0_train.jsonl")])
def test_memory_does_not_grow_with_the_file(task: str, name: str, tmp_path: Path) -> None:
    peak_of_preparing(task, name, 10, tmp_path)  # what is imported and cached once
    small, large = (peak_of_preparing(task, name, records, tmp_path) for records in (4200, 12600))
    assert large < 1.1 * small, f"{small:,} and {large:,} bytes"
    assert large < 24e6  # a group of 1024 rows of 3 kB, twice, and some

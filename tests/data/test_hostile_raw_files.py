# SPDX-License-Identifier: Apache-2.0
"""What is wrong in a raw file ends as one line with file and line, and leaves nothing that looks complete."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.data.raw_samples import GOOD, PAIR, QUESTION, TABLE, TALK, XML, lines, prepare, rows

BOMB = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>'
OUTSIDE = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/hostname">]>'
HOSTILE: dict[str, tuple[str, str, bytes, str]] = {
    "bad json": ("mnli", "multinli_1.0_train.jsonl", lines(PAIR) + b'{"pairID": \n', "train.jsonl:2: not valid JSON"),
    "a key twice": (
        "mnli",
        "multinli_1.0_train.jsonl",
        b'{"a": 1, "a": 2}\n',
        "train.jsonl:1: not strict JSON: key 'a'",
    ),
    "not utf-8": ("mnli", "multinli_1.0_train.jsonl", b'{"a": "\xff"}\n', "train.jsonl:1: byte 8 is not UTF-8"),
    "a list": ("mnli", "multinli_1.0_train.jsonl", b"[1]\n", "train.jsonl:1: expected a JSON object, found a list"),
    "deep": ("mnli", "multinli_1.0_train.jsonl", b"[" * 200_000 + b"\n", "train.jsonl:1: "),
    "huge line": ("mnli", "multinli_1.0_train.jsonl", b"x" * (5 * 2**20), "train.jsonl:1: longer than 4194304 bytes"),
    "half a pair": (
        "mnli",
        "multinli_1.0_train.jsonl",
        lines({**PAIR, "sentence1": "\ud800"}),
        "half a surrogate pair",
    ),
    "empty": (
        "mnli",
        "multinli_1.0_train.jsonl",
        lines({**PAIR, "sentence2": " "}),
        "train.jsonl:1: sentence2 is empty",
    ),
    "wrong type": (
        "mnli",
        "multinli_1.0_train.jsonl",
        lines({**PAIR, "sentence2": 3}),
        "sentence2 is a number, expected",
    ),
    "label": ("mnli", "multinli_1.0_train.jsonl", lines({**PAIR, "gold_label": "maybe"}), "gold_label is 'maybe'"),
    "id twice": ("mnli", "multinli_1.0_train.jsonl", lines(PAIR, PAIR), "train.jsonl:2: the id '1e' is used before"),
    "large row": ("mnli", "multinli_1.0_train.jsonl", lines({**PAIR, "sentence1": "x" * 2**20}), "at most 1048576 fit"),
    "tsv fields": ("mnli", "train.tsv", b"pairID\tsentence1\tsentence2\tgold_label\na\tb\n", "train.tsv:2: 2 fields"),
    "tsv header": ("mnli", "train.tsv", b"a\tb\n", "train.tsv:1: the first line must name pairID"),
    "tsv empty": ("mnli", "train.tsv", b"", "train.tsv is empty"),
    "no table": ("wikisql", "train.jsonl", lines({**QUESTION, "table_id": "x"}), "table_id 'x' is not in"),
    "odd table id": ("wikisql", "train.jsonl", lines({**QUESTION, "table_id": "\ud800"}), "half a surrogate pair"),
    "column": ("wikisql", "train.jsonl", lines({**QUESTION, "sql": {"sel": 3, "agg": 0, "conds": []}}), "sel is '3'"),
    "truth": (
        "wikisql",
        "train.jsonl",
        lines({**QUESTION, "sql": {"sel": True, "agg": 0, "conds": []}}),
        "sel is 'True'",
    ),
    "condition": (
        "wikisql",
        "train.jsonl",
        lines({**QUESTION, "sql": {"sel": 1, "agg": 0, "conds": [[0]]}}),
        "a condition",
    ),
    "table": ("wikisql", "train.tables.jsonl", lines(TABLE, {"id": "t"}), "train.tables.jsonl:2: header is missing"),
    "tables twice": (
        "wikisql",
        "train.tables.jsonl",
        lines(TABLE, TABLE),
        "train.tables.jsonl:2: the table '1-10-1' is",
    ),
    "sql": ("wikisql", "train.jsonl", lines({**QUESTION, "sql": "select"}), "sql is text, expected an object"),
    "an array in one line": (
        "samsum",
        "train.json",
        json.dumps([TALK, {**TALK, "id": "14", "summary": ""}]).encode(),
        "train.json:1: record 2 of the file: summary is empty",
    ),
    "array ends": ("samsum", "train.json", json.dumps([TALK]).encode()[:-1], "train.json:1: ends where ] is expected"),
    "array is cut": (
        "samsum",
        "train.json",
        json.dumps([TALK], indent=1).encode()[:40],
        "train.json:4: not valid JSON",
    ),
    "no array": ("samsum", "train.json", json.dumps(TALK).encode(), "train.json:1: expected [ and found"),
    "after the array": (
        "samsum",
        "train.json",
        json.dumps([TALK]).encode() + b"\n1",
        "train.json:2: something follows",
    ),
    "array not utf-8": ("samsum", "train.json", b'[\n{"id": "\xff"}]', "train.json:2: not UTF-8"),
    "endless element": ("samsum", "train.json", b'["' + b"x" * (9 * 2**20), "a record of more than 4194304 characters"),
    "summary null": (
        "samsum",
        "train.json",
        json.dumps([{**TALK, "summary": None}]).encode(),
        "train.json:1: summary is null",
    ),
    "two parts": (
        "dart",
        "dart-v1.1.1-full-train.json",
        b'[{"tripleset": [["a","b"]]}]',
        "triple 1 is not three texts",
    ),
    "no sentence": (
        "dart",
        "dart-v1.1.1-full-train.json",
        b'[{"tripleset": [["a","b","c"]], "annotations": []}]',
        "an empty list",
    ),
    "bomb": ("webnlg", "train.xml", (BOMB + "<b>&b;</b>").encode(), "train.xml:1: a document type declaration"),
    "outside": ("webnlg", "train.xml", (OUTSIDE + "<b>&a;</b>").encode(), "train.xml:1: a document type declaration"),
    "utf-16 bomb": ("webnlg", "train.xml", (BOMB + "<b>&b;</b>").encode("utf-16"), "a document type declaration"),
    "no encoding": ("webnlg", "train.xml", b'<?xml version="1.0" encoding="f-8"?><a/>', "its encoding cannot be read"),
    "odd encoding": (
        "webnlg",
        "train.xml",
        b'<?xml version="1.0" encoding="zlib"?><a/>',
        "its encoding cannot be read",
    ),
    "big5": ("webnlg", "train.xml", b'<?xml version="1.0" encoding="big5"?><a/>', "its encoding cannot be read"),
    "not xml": ("webnlg", "train.xml", b"<a>\n</b>", "train.xml:2: not well-formed XML (mismatched tag)"),
    "deep xml": ("webnlg", "train.xml", b"<a>" * 40, "nested more than 32 deep"),
    "endless tag": ("webnlg", "train.xml", b'<a b="' + b"x" * (5 * 2**20), "something longer than 4194304 bytes"),
    "category": ("webnlg", "train.xml", XML.format(category="Song").encode(), "train.xml:3: category 'Song'"),
    "mtriple": (
        "webnlg",
        "train.xml",
        XML.format(category="Airport").replace(" | p | ", "|p|").encode(),
        "mtriple 'A|p|",
    ),
    "entries": (
        "webnlg",
        "train.json",
        b'{"entries": [{"1": {}, "2": {}}]}',
        "an entry is not an object with one number",
    ),
    "other key": ("webnlg", "train.json", b'{"data": []}', 'expected "entries" and found'),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_end_with_file_and_line_and_leave_nothing(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, name, content, message = HOSTILE[case]
    files = {**GOOD[task], name: content} if task == "wikisql" else {name: content}
    assert prepare(task, tmp_path, files) == 3
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["raw"]


def test_what_is_rejected_within_the_budget_is_named_and_the_rest_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = b'{"a": \n' + b"y" * (5 * 2**20) + b"\n" + lines(PAIR)
    assert prepare("mnli", tmp_path, {"multinli_1.0_train.jsonl": content}, "--max-rejected", "2") == 0
    error = capsys.readouterr().err
    assert "train.jsonl:1: not valid JSON" in error
    assert "train.jsonl:2: longer than" in error
    assert [row["id"] for row in rows(tmp_path)] == ["1e"]

# SPDX-License-Identifier: Apache-2.0
"""A record of each data set in its published format, and a preparer run over files of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_prep.__main__ import main

TABLE = {
    "id": "1-10-1",
    "header": ["State", "No.", "Notes"],
    "types": ["text", "real", "text"],
    "rows": [["a", 1, "b"]],
}
QUESTION = {
    "phase": 1,
    "table_id": "1-10-1",
    "question": 'Who said "no" in São Tomé — عربي e\u0301 😀 ? ',
    "sql": {"sel": 2, "agg": 3, "conds": [[0, 0, "SOUTH 'X'"], [1, 1, 4.5]]},
}
PAIR = {"pairID": "1e", "sentence1": "It rained.", "sentence2": "It was wet.", "gold_label": "entailment", "genre": "x"}
TALK = {"id": "13", "summary": "A greets B.", "dialogue": "A: Hi\r\nB: Hello \r\n\r\nA: 😀"}
TRIPLES = {
    "tripleset": [["A", "R", "B"], ["A", "S", "C"]],
    "annotations": [{"source": "e2e", "text": "One."}, {"text": "Two."}],
}
XML = """<?xml version="1.0" encoding="utf-8"?>
<benchmark><entries>
<entry category="{category}" eid="Id1" size="1">
<originaltripleset><otriple>A | p | "B &amp; Söhne"@de</otriple></originaltripleset>
<modifiedtripleset><mtriple>A | p | "B &amp; Söhne"</mtriple></modifiedtripleset>
<lex comment="good" lid="Id1">A is &lt;B&gt; &#233;.</lex><lex comment="toFix" lid="Id2">Bad.</lex>
</entry>
</entries></benchmark>
"""


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def prepare(task: str, tmp_path: Path, files: dict[str, bytes], *flags: str, out: str = "out") -> int:
    raw = write(tmp_path / "raw", files)
    return main([task, "--raw", str(raw), "--out", str(tmp_path / out), *flags])


def rows(tmp_path: Path, split: str = "train", out: str = "out") -> list[dict[str, Any]]:
    return pq.read_table(tmp_path / out / f"{split}.parquet").to_pylist()


GOOD: dict[str, dict[str, bytes]] = {
    "wikisql": {"train.jsonl": lines(QUESTION), "train.tables.jsonl": lines(TABLE)},
    "mnli": {"multinli_1.0_train.jsonl": lines(PAIR)},
    "samsum": {"train.json": json.dumps([TALK]).encode()},
    "dart": {"dart-v1.1.1-full-train.json": json.dumps([TRIPLES], indent=2).encode()},
    "webnlg": {"train/1triples/a.xml": XML.format(category="Airport").encode()},
    "jsonl": {"train.jsonl": lines({"prompt": "a", "completion": "b"}), "dev.jsonl": lines({"text": "c", "id": 1})},
    "csv": {"train.csv": b"instruction,input,output\na,b,c\n"},
}

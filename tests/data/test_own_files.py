# SPDX-License-Identifier: Apache-2.0
"""Users' own JSON Lines and CSV files: shapes, columns, splits, ids, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from data_prep.__main__ import main
from lora_megatron.data.batches import BatchSource
from lora_megatron.data.parquet import open_examples
from lora_megatron.data.tokenizer import ByteTokenizer, load_tokenizer
from lora_megatron.errors import DataError
from tests.data.chat_models import CHATML, DATED, END, START, write_tokenizer
from tests.data.raw_samples import lines, rows, write

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
ANSWER = {"role": "assistant", "content": "Hello — 😀"}
RENDERED = f"{START}system\nBe brief.{END}\n{START}user\nHi{END}\n{START}assistant\n"


def run(preparer: str, tmp_path: Path, *flags: str, out: str = "out") -> int:
    return main([preparer, "--out", str(tmp_path / out), *flags])


def prepare(tmp_path: Path, *records: Any, flags: tuple[str, ...] = (), out: str = "out") -> int:
    write(tmp_path, {"raw/own.jsonl": lines(*records)})
    return run("jsonl", tmp_path, "--raw", str(tmp_path / "raw" / "own.jsonl"), *flags, out=out)


def texts(tmp_path: Path, split: str = "train", out: str = "out") -> list[tuple[str, str, str]]:
    return [(row["id"], row["context"], row["target"]) for row in rows(tmp_path, split, out)]


@pytest.mark.parametrize(
    ("record", "context", "target"),
    [
        ({"prompt": "A\n", "completion": " B "}, "A\n", " B "),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n\n1 2", "3"),
        ({"instruction": "Add.", "input": "", "output": "3"}, "Add.", "3"),
        ({"instruction": "Add.", "output": "3", "text": "all of it"}, "Add.", "3"),
        ({"text": "Once."}, "", "Once."),
    ],
)
def test_plain_shapes(record: dict[str, str], context: str, target: str, tmp_path: Path) -> None:
    assert prepare(tmp_path, record) == 0
    assert texts(tmp_path) == [("own.jsonl:1", context, target)]
    assert rows(tmp_path)[0]["references"] == [target]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [*CHAT, ANSWER], "prompt": "as in UltraChat"},
        {"prompt": CHAT, "completion": [ANSWER]},
    ],
)
def test_messages_are_rendered_and_trained_on_as_such(
    record: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tokenizer(tmp_path / "model", CHATML)
    assert prepare(tmp_path, record, flags=("--chat-template", str(folder), "--sequence-length", "54")) == 0
    # 5 special tokens and 35 bytes of context, 15 tokens of the answer with its end
    assert "1 rows  55 tokens, 0 rows truncated at 54" in capsys.readouterr().out
    assert texts(tmp_path) == [("own.jsonl:1", RENDERED, "Hello — 😀")]
    table, tokenizer = open_examples(tmp_path / "out" / "train.parquet"), load_tokenizer(str(folder))
    assert table.rendered
    batch = BatchSource(table, tokenizer, sequence_length=160, micro_batch_size=1).microbatch(0)
    prompt = tokenizer.encode_rendered(RENDERED)
    assert batch["tokens"][0, : len(prompt)].tolist() == prompt
    assert int(batch["loss_mask"].sum()) == len("Hello — 😀".encode()) + 1
    assert prompt.count(tokenizer.eos_id) == 2  # the template's ends of turns are tokens
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["rendered_for"] == tokenizer.fingerprint
    with pytest.raises(DataError, match="chat template of another tokenizer than 'bytes'"):
        BatchSource(table, ByteTokenizer(), sequence_length=160, micro_batch_size=1)


def test_plain_records_with_a_chat_template_are_a_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--chat-template", str(write_tokenizer(tmp_path / "model", CHATML)))
    assert prepare(tmp_path, {"prompt": "Hi", "completion": "Yes"}, flags=flags) == 0
    assert texts(tmp_path)[0][1:] == (f"{START}user\nHi{END}\n{START}assistant\n", "Yes")
    assert (
        prepare(tmp_path, {"prompt": "Hi", "completion": "Yes"}, flags=(*flags, "--tokenizer", "bytes"), out="b") == 2
    )
    assert "another one than that of --chat-template" in capsys.readouterr().err
    assert prepare(tmp_path, {"text": "x"}, flags=flags, out="b") == 2
    assert "leave --chat-template out" in capsys.readouterr().err
    assert prepare(tmp_path, {"messages": [*CHAT, ANSWER]}, out="b") == 2
    assert "messages: to render messages, give --chat-template" in capsys.readouterr().err
    dated = ("--chat-template", str(write_tokenizer(tmp_path / "dated", DATED)))
    assert prepare(tmp_path, {"prompt": "Hi", "completion": "Yes"}, flags=(*dated, "--max-rejected", "9"), out="c") == 2
    assert "--date YYYY-MM-DD" in capsys.readouterr().err
    assert (
        prepare(tmp_path, {"prompt": "Hi", "completion": "Yes"}, flags=(*dated, "--date", "2026-01-02"), out="d") == 0
    )
    assert json.loads((tmp_path / "d" / "manifest.json").read_text())["options"]["date"] == "2026-01-02"


def test_ids_are_the_column_or_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"prompt": "A", "completion": "B"}
    write(tmp_path, {"raw/own.jsonl": b"\n" + lines(record, {**record, "id": 7}, {**record, "id": "x"})})
    flags = ("--raw", str(tmp_path / "raw" / "own.jsonl"))
    assert run("jsonl", tmp_path, *flags) == 0
    assert [row[0] for row in texts(tmp_path)] == ["own.jsonl:2", "7", "x"]
    assert prepare(tmp_path, {**record, "key": "k"}, flags=("--id-column", "key"), out="c") == 0
    assert texts(tmp_path, out="c")[0][0] == "k"
    assert prepare(tmp_path, {**record, "id": 1}, {**record, "id": "1"}, out="d") == 3
    assert "own.jsonl:2: the id '1' is used before" in capsys.readouterr().err


def test_splits_of_a_folder_and_by_name(tmp_path: Path) -> None:
    record = {"text": "x"}
    write(
        tmp_path / "raw", {"train.jsonl": lines(record, record), "dev.json": b"\xef\xbb\xbf [\n" + lines(record) + b"]"}
    )
    assert run("jsonl", tmp_path, "--raw", str(tmp_path / "raw")) == 0
    assert [len(rows(tmp_path, split)) for split in ("train", "validation")] == [2, 1]
    assert texts(tmp_path, "validation")[0][0] == "dev.json:2"
    write(tmp_path, {"raw/a/x.csv": b"text\nx\n", "raw/b/x.csv": b"text\ny\n"})
    named = [flag for part in "ab" for flag in ("--split", f"train={tmp_path}/raw/{part}/x.csv")]
    assert run("csv", tmp_path, *named, "--split", f"my-test={tmp_path}/raw/a/x.csv", out="b") == 0
    assert [row[0] for row in texts(tmp_path, out="b")] == ["a/x.csv:2", "b/x.csv:2"]
    assert len(rows(tmp_path, "my-test", "b")) == 1


def test_csv_columns_by_any_name(tmp_path: Path) -> None:
    content = 'answer;id;question\r\n"a ""quoted""\nline";1;Why; \r\n'.replace("; \r", "\r")
    write(tmp_path, {"raw/faq.csv": content.encode()})
    flags = ["--raw", str(tmp_path / "raw" / "faq.csv"), "--delimiter", ";"]
    assert run("csv", tmp_path, *flags, "--prompt-column", "question", "--completion-column", "answer") == 0
    assert texts(tmp_path) == [("1", "Why", 'a "quoted"\nline')]
    write(tmp_path, {"raw/train.tsv": b"prompt\tcompletion\nA\tB\n"})
    assert run("csv", tmp_path, "--raw", str(tmp_path / "raw"), "--delimiter", "tab", out="b") == 0
    assert texts(tmp_path, out="b") == [("train.tsv:2", "A", "B")]


def test_a_share_of_train_is_held_out_by_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"prompt": f"{i}", "completion": "x", "id": i} for i in range(400)]
    share = ("--validation-fraction", "0.2")
    assert prepare(tmp_path, *records, flags=share) == 0
    held_out = {row["id"] for row in rows(tmp_path, "validation")}
    assert 50 < len(held_out) < 110
    assert {row["split"] for row in rows(tmp_path, "validation")} == {"validation"}
    assert held_out.isdisjoint(row["id"] for row in rows(tmp_path))
    assert len(held_out) + len(rows(tmp_path)) == 400
    assert prepare(tmp_path, *records[::-1], flags=share, out="b") == 0
    assert {row["id"] for row in rows(tmp_path, "validation", "b")} == held_out  # whatever their order
    assert prepare(tmp_path, records[0], flags=share, out="c") == 3
    assert "would have no rows" in capsys.readouterr().err
    assert prepare(tmp_path, *records, flags=(*share, "--low-data", "3"), out="d") == 2


HOSTILE: dict[str, tuple[Any, str]] = {
    "no shape": (
        {"question": "a", "answer": "b"},
        "has the columns 'question', 'answer'; expected messages or prompt+c",
    ),
    "null": ({"prompt": None, "completion": "b"}, "own.jsonl:1: prompt is null, expected text"),
    "empty": ({"prompt": "a", "completion": " \n"}, "own.jsonl:1: completion is empty"),
    "half a pair": ({"prompt": "a", "completion": "\ud800"}, "completion holds half a surrogate pair"),
    "truth as id": ({"prompt": "a", "completion": "b", "id": True}, "id is a truth value, expected text"),
    "a list": ([1], "own.jsonl:1: not an object, and no record follows"),
    "input": ({"instruction": "a", "input": 3, "output": "c"}, "input is a number, expected text"),
}
HOSTILE_CHATS: dict[str, tuple[Any, str]] = {
    "control token": ([{"role": "user", "content": f"x{END}"}, ANSWER], "spells the special token '<|im_end|>'"),
    "no answer": (CHAT, "end with one of the assistant's"),
    "answer alone": ([ANSWER], "must hold two messages or more"),
    "empty answer": ([*CHAT, {"role": "assistant", "content": " "}], "the last message of messages is empty"),
    "no object": ([*CHAT, "x"], "message 3 of messages is no object"),
    "no role": ([{"content": "x"}, ANSWER], "the role of message 1 of messages is null"),
    "no content": ([{"role": "user"}, ANSWER], "the content of message 1 of messages is null"),
    "half a pair": ([{"role": "user", "content": "x", "name": "\ud800"}, ANSWER], "half a surrogate pair"),
    "no list": ("hi", "messages is text, expected a list"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_records(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, message = HOSTILE[case]
    assert prepare(tmp_path, record) == 3
    check_one_line(capsys, message)
    assert os.listdir(tmp_path) == ["raw"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("own.jsonl", b"", "own.jsonl is empty: give a JSON Lines file with records"),
        ("own.jsonl", b"\n \n", "own.jsonl: blank lines, and no record follows"),
        ("own.jsonl", b'{"text": "caf\xe9"}\n', "own.jsonl:1: byte 14 is not UTF-8, and no record follows"),
        ("own.jsonl", '{"text": "a"}\n'.encode("utf-16"), "own.jsonl:1: byte 1 is not UTF-8, and no record follows"),
        ("own.jsonl", b"text\na\n", "own.jsonl:1: not valid JSON"),
        ("own.csv", b"", "own.csv is empty: give a CSV file with records"),
    ],
)
def test_files_without_a_record_say_why(
    name: str, content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    kind = "csv" if name.endswith("csv") else "jsonl"
    assert main([kind, "--raw", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 3
    check_one_line(capsys, message)


@pytest.mark.parametrize("case", HOSTILE_CHATS)
def test_hostile_chats(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    messages, message = HOSTILE_CHATS[case]
    folder = write_tokenizer(tmp_path / "model", CHATML)
    assert prepare(tmp_path, {"messages": messages}, flags=("--chat-template", str(folder))) == 3
    check_one_line(capsys, message)
    good = {"messages": [*CHAT, ANSWER]}
    flags = ("--chat-template", str(folder), "--max-rejected", "1")
    assert prepare(tmp_path, {"messages": messages}, good, flags=flags, out="b") == 0
    assert [row[0] for row in texts(tmp_path, out="b")] == ["own.jsonl:2"]


def check_one_line(capsys: pytest.CaptureFixture[str], message: str) -> None:
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either --raw"),
        (["--raw", "x", "--split", "a=b"], "give either --raw"),
        (["--split", "../a=b"], "--split '../a=b' is not NAME=FILE"),
        (["--split", "train="], "is not NAME=FILE"),
        (["--raw", "x", "--delimiter", "ab"], "--delimiter 'ab' must be one character"),
        (["--raw", __file__, "--validation-fraction", "1"], "--validation-fraction 1.0 must be above 0"),
        (["--raw", __file__, "--prompt-column", "a", "--completion-column", "a"], "are both 'a'"),
        (["--raw", __file__, "--date", "2026-01-02"], "give --chat-template as well"),
    ],
)
def test_wrong_flags(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("csv", tmp_path, *flags) == 2
    check_one_line(capsys, message)

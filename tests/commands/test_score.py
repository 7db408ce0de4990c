# SPDX-License-Identifier: Apache-2.0
"""`lora-megatron score` over good and hostile files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_megatron.__main__ import main
from tests.metrics.test_wikisql import SQL, meta

PREDICTIONS = "The Mill is a cheap pub.\n\nAlimentum is near the river.\n"
REFERENCES = "The Mill is a cheap pub.\nA cheap pub is The Mill.\n\nIt is dear.\n\n\nAlimentum is near the river.\n\n"


def run(tmp_path: Path, predictions: str | bytes, references: str | bytes, *flags: str, task: str = "e2e") -> int:
    for name, content in (("p.txt", predictions), ("r.txt", references)):
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    files = ["--predictions", str(tmp_path / "p.txt"), "--references", str(tmp_path / "r.txt")]
    return main(["score", "--task", task, *files, "--bootstrap", "20", *flags])


@pytest.fixture(autouse=True)
def without_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, PREDICTIONS, REFERENCES, "--json") == 0
    out = capsys.readouterr()
    found = json.loads(out.out)
    assert set(found["scores"]) == {"bleu", "nist", "rouge_l", "cider"}
    assert found["scores"]["rouge_l"] == pytest.approx(200 / 3)
    assert set(found["unavailable"]) == {"meteor"}
    assert (found["instances"], found["task"], out.err) == (3, "e2e", "")
    low, high = found["intervals"]["rouge_l"]
    assert low <= found["scores"]["rouge_l"] <= high


def test_a_table_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, PREDICTIONS, REFERENCES) == 0
    out = capsys.readouterr().out
    assert "e2e: 3 instances" in out
    assert "95% interval" in out
    assert "66.67" in out
    assert "meteor is not available: METEOR 1.5 is a Java program" in out


def test_windows_files_and_a_byte_order_mark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marked = b"\xef\xbb\xbf" + PREDICTIONS.replace("\n", "\r\n").encode()
    results = []
    for files in ((PREDICTIONS, REFERENCES), (marked, REFERENCES.replace("\n", "\r\n"), "--seed", "0")):
        assert run(tmp_path, *files, "--json") == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0] == results[1]


def test_wikisql_takes_metas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.jsonl").write_text(f"{meta()}\n{meta()}\n")
    flags = ("--json", "--metas", str(tmp_path / "m.jsonl"))
    assert run(tmp_path, f"{SQL}\nDROP TABLE rows\n", f"{SQL}\n\n{SQL}\n", *flags, task="wikisql") == 0
    assert json.loads(capsys.readouterr().out)["scores"] == {"logical_form": 50, "execution": 50}
    assert run(tmp_path, f"{SQL}\n", f"{SQL}\n", *flags, task="wikisql") == 3
    assert "m.jsonl has 2 lines for 1 predictions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ("a\nb\nc\n", "x\n\ny\n", "p.txt has 3 predictions (lines), "),
        ("a\nb\nc\n", "x\n\ny\n", "r.txt has 2 instances"),
        ("a\nb\n", "x\ny\n", "r.txt has 1 instances (groups of lines, blank lines between them)"),
        ("", "x\n", "p.txt is empty: give a prediction a line"),
        ("a\n", "", "r.txt holds no reference"),
        ("a\n", " \n\n", "r.txt holds no reference"),
        (b"a\nb\xff\n", "x\n\ny\n", "p.txt:2: byte 2 is not UTF-8"),
        ("a\n", b"\xfe\xff\0x", "r.txt:1: byte 1 is not UTF-8"),
    ],
)
def test_hostile_files_end_with_one_line_and_status_3(
    predictions: str | bytes,
    references: str | bytes,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(tmp_path, predictions, references) == 3
    out = capsys.readouterr()
    assert message in out.err
    assert (out.out, out.err.count("\n")) == ("", 1)


def test_blank_predictions_are_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "\n\n\n", REFERENCES, "--json") == 0
    assert set(json.loads(capsys.readouterr().out)["scores"].values()) == {0}
    assert run(tmp_path, "\n\n\n", REFERENCES, "--json", task="dart") == 0
    assert json.loads(capsys.readouterr().out)["scores"] == {"bleu": 0, "ter": pytest.approx(100)}


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_files_that_cannot_be_read(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("a\n")
    path = str(tmp_path / name)
    files = ["--predictions", str(tmp_path / "p.txt"), "--references", path]
    assert main(["score", "--task", "text", *files]) == 3
    assert capsys.readouterr().err.startswith(f"error: cannot read {path}")


def test_wrong_settings_end_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "a\n", "a\n", task="e2f") == 2
    assert (
        "--task 'e2f' is unknown; use one of wikisql, mnli, samsum, e2e, dart, webnlg, text" in capsys.readouterr().err
    )
    assert run(tmp_path, "a\n", "a\n", "--seed", "-1") == 2
    assert "--seed -1 cannot be: give 0 or more" in capsys.readouterr().err


def test_the_references_of_another_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An accuracy of 0 would say nothing."""
    assert run(tmp_path, "neutral\nneutral\n", "neutral\n\na text\n", task="mnli") == 3
    assert "instance 2: 'a text' is no label of mnli (" in capsys.readouterr().err

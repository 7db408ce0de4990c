# SPDX-License-Identifier: Apache-2.0
"""An evaluation that was killed or stopped goes on as if nothing had been: the same predictions, byte by byte."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lora_megatron.__main__ import main
from lora_megatron.commands import evaluate
from lora_megatron.evaluation.predictions import PredictionLog
from tests.evaluation.commands import CONTEXTS, save_rows
from tests.evaluation.conftest import Reader
from tests.faults.ranks import start

ROWS, BATCH = 30, 2  # windows of 16 rows
FILES = ("predictions.jsonl", "scores.json", "evaluation.json")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    contexts = [f"{CONTEXTS[row % len(CONTEXTS)]} {row}" for row in range(ROWS)]
    return save_rows(tmp_path_factory.mktemp("rows") / "data", [(context, [context]) for context in contexts])


def words(files: Reader, data: Path, out: Path, *more: str) -> list[str]:
    common = ["--data", str(data), "--batch-size", str(BATCH), "--max-new-tokens", "6", "--bootstrap", "5"]
    adapter = ["--adapter", str(files.adapter)]
    return ["evaluate", str(files.config), "--task", "e2e", "--beams", "3", "--out", str(out), *adapter, *common, *more]


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def whole(reader: Callable[[str], Reader], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The evaluation without a disturbance; read only."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(words(reader("llama"), data, out)) == 0
    return out


@pytest.fixture(scope="module")
def straight(reader: Callable[[str], Reader], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on two tensor ranks."""
    folder = tmp_path_factory.mktemp("straight")
    command = words(reader("llama"), data, folder / "out", "parallel.tensor=2")
    with start(command, world=2, logs=folder / "logs") as ranks:
        assert ranks.statuses() == [0, 0]
    return folder / "out"


def disturb(number: int, victim: int, rows: int) -> None:
    """Let rank `victim` signal itself once so many rows are written, the last of them in half if it is a kill."""
    append = PredictionLog.append

    def appending(self: PredictionLog, answers: Any) -> None:
        append(self, answers)
        if len(self.answers) >= rows:
            if number == signal.SIGKILL:
                with open(self.path, "r+b") as file:
                    file.truncate(self.path.stat().st_size - 20)
            os.kill(os.getpid(), number)

    if int(os.environ["RANK"]) == victim:
        PredictionLog.append = appending


@pytest.mark.parametrize(
    ("number", "statuses"), [(signal.SIGKILL, [-9, 6]), (signal.SIGTERM, [75, 75])], ids=["kill", "term"]
)
def test_the_same_command_goes_on(
    reader: Callable[[str], Reader], data: Path, straight: Path, tmp_path: Path, number: int, statuses: list[int]
) -> None:
    out, files = tmp_path / "out", reader("llama")
    command = words(files, data, out, "parallel.tensor=2")
    with start(command, world=2, logs=tmp_path / "logs", before=partial(disturb, number, victim=0, rows=16)) as ranks:
        assert ranks.statuses() == statuses
        said = ranks.log()
    assert not (out / "scores.json").exists()
    written = (out / "predictions.jsonl").read_bytes()
    assert written.count(b"\n") == (15 if number == signal.SIGKILL else 16)
    if number == signal.SIGTERM:
        assert "SIGTERM stopped the evaluation (16 predictions in" in said
        assert "go on with the same command" in said
    with start(command, world=2, logs=tmp_path / "logs-2") as ranks:
        assert ranks.statuses() == [0, 0]
    assert contents(out) == contents(straight)


@pytest.mark.parametrize("kept", [0, 1, 17, ROWS], ids=str)
def test_any_number_of_lines_is_continued(
    reader: Callable[[str], Reader], data: Path, whole: Path, tmp_path: Path, kept: int
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "scores.json").unlink()
    lines = (whole / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    (out / "predictions.jsonl").write_bytes(b"".join(lines[:kept]) + b'{"id": "torn')
    assert main(words(reader("llama"), data, out)) == 0
    assert contents(out) == contents(whole)


def test_what_is_done_is_scored_without_the_model(
    reader: Callable[[str], Reader], data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    monkeypatch.setattr(evaluate, "_predict", None)
    assert main(words(reader("llama"), data, out, "--bootstrap", "7")) == 0
    assert json.loads((out / "scores.json").read_text())["bootstrap"] == 7


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--length-penalty", "0.5"], "length_penalty is 0.8 there and 0.5 here"),
        (["--limit", "5"], "rows is 30 there and 5 here"),
        (["--beams", "1"], "beams is 3 there and null here"),
        (["--task", "dart"], 'task is "e2e" there and "dart" here'),
    ],
)
def test_another_evaluation_s_predictions_are_not_continued(
    reader: Callable[[str], Reader],
    data: Path,
    whole: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    says: str,
) -> None:
    before = contents(whole)
    assert main(words(reader("llama"), data, whole, *more)) == 2
    said = capsys.readouterr().err
    assert f"--out {whole} holds another evaluation: {says}" in said
    assert contents(whole) == before


def test_predictions_of_another_adapter_are_not_continued(
    reader: Callable[[str], Reader], data: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = words(reader("llama"), data, whole)
    at = command.index("--adapter")
    assert main(command[:at] + command[at + 2 :]) == 2
    assert "holds another evaluation: adapter is " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda lines: [b"nonsense\n", *lines[1:]], "line 1 cannot be read"),
        (lambda lines: [lines[1], *lines[1:]], "line 1 is not of row row-0"),
        (lambda lines: [*lines, lines[0]], f"line {ROWS + 1} is more than there are rows"),
    ],
)
def test_damaged_predictions_are_named(
    reader: Callable[[str], Reader],
    data: Path,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[list[bytes]], list[bytes]],
    says: str,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    path = out / "predictions.jsonl"
    path.write_bytes(b"".join(damage(path.read_bytes().splitlines(keepends=True))))
    assert main(words(reader("llama"), data, out)) == 4
    assert f"{path}: {says}: delete the file to predict anew" in capsys.readouterr().err

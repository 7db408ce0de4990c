# SPDX-License-Identifier: Apache-2.0
"""What a run of any method left is evaluated from its own config.yaml, and says what its report says it said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_megatron.__main__ import main
from tests.commands.conftest import corpus
from tests.commands.runs import Outcome, attempt, make_tree
from tests.evaluation.commands import lines_of

__all__ = ["corpus"]
ROWS, NEW = 6, 8  # of the validation data; sequences of 16 tokens have room for so many


@pytest.mark.parametrize("method", ["lora", "bitfit", "ft_top2", "full"])
def test_a_run_is_evaluated_from_its_folder(corpus: Path, tmp_path: Path, method: str) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    train, optimizer = {"samples": ROWS, "steps": 8}, {"lr": 0.02}
    tree = make_tree(corpus, run, method={"name": method}, train=train, optimizer=optimizer)
    assert attempt(tree) == Outcome()
    samples = json.loads((run / "report.json").read_text())["samples"]
    assert [s["before"] for s in samples] != [s["after"] for s in samples], "the training must change what is said"
    trained = [f"base.weights={run / 'model'}"] if method == "full" else ["--adapter", str(run / "adapter")]
    common = ["--task", "text", "--max-new-tokens", str(NEW), "--bootstrap", "0"]
    assert main(["evaluate", str(run / "config.yaml"), *common, "--out", str(out), *trained]) == 0
    assert [line["prediction"] for line in lines_of(out / "predictions.jsonl")] == [s["after"] for s in samples]
    base = tmp_path / "base"
    assert main(["evaluate", str(run / "config.yaml"), *common, "--out", str(base)]) == 0
    assert [line["prediction"] for line in lines_of(base / "predictions.jsonl")] == [s["before"] for s in samples]


def test_a_run_that_trained_the_whole_model_has_no_adapter(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert attempt(make_tree(corpus, run, method={"name": "full"}, train={"steps": 1})) == Outcome()
    capsys.readouterr()
    words = ["--task", "text", "--out", str(tmp_path / "out"), "--adapter", str(run)]
    assert main(["evaluate", str(run / "config.yaml"), *words]) == 4
    assert f"give base.weights={run / 'model'} and no adapter" in capsys.readouterr().err

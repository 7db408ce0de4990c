# SPDX-License-Identifier: Apache-2.0
"""launch/e2e_rescore.py: an experiment's predictions, scored anew where no model is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_prep.__main__ import main as data_prep
from launch import e2e_rescore
from launch.e2e_plan import Settings, evaluation_folder
from launch.e2e_report import write_findings
from lora_megatron.data.parquet import open_examples
from lora_megatron.evaluation.predictions import PredictionLog
from lora_megatron.evaluation.rows import instances_of
from lora_megatron.measure.atomic import write_json
from lora_megatron.metrics import tasks
from lora_megatron.metrics.sums import Unavailable, average
from tests.launch.test_e2e_experiment import write_raw

GONE = {"meteor": "no Java on that machine"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What comes back from the machine with the GPU: lora-seed1 is evaluated on three instances, full-seed1 is not."""
    out = tmp_path / "out"
    assert (
        data_prep(["e2e", "--raw", str(write_raw(tmp_path / "raw") / "e2e"), "--out", str(out / "data" / "e2e")]) == 0
    )
    settings = Settings(raw=tmp_path / "raw", out=out, seeds=(1,), jobs=5, limit=3)
    write_json(out / "settings.json", settings.identity())
    table = open_examples(out / "data" / "e2e" / "test.parquet", with_references=True)
    instances = instances_of(table, group=True, limit=3)
    evaluated = evaluation_folder("lora-seed1", settings)
    evaluated.mkdir(parents=True)
    identity = {"data": table.content_hash, "rows": 3, "beams": 10}
    log = PredictionLog(evaluated, identity, [instance.id for instance in instances])
    log.append([{"prediction": instance.references[0]} for instance in instances])
    log.close()
    scores = {"bleu": 100.0, "rouge_l": 7.0}  # ROUGE-L is not what these texts have
    write_json(
        evaluated / "scores.json",
        {"task": "e2e", "scores": scores, "unavailable": GONE, "bootstrap": 7, "instances": 3, "evaluation": identity},
    )
    write_findings(settings, command="python launch/e2e_experiment.py --as-it-was")
    return out


def test_every_metric_is_computed_anew_and_reported(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tasks, "meteor", lambda texts, references: average([True, True, False]))
    assert e2e_rescore.main(["--out", str(folder)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{folder / 'report.md'}\n"
    assert "lora-seed1: rouge_l is 100.0 here and was 7.0" in said.err
    assert "missing: base, lora-seed1, full-seed1" in said.err  # none has a training's report
    scores = json.loads((folder / "evaluations" / "lora-seed1" / "scores.json").read_text(encoding="utf-8"))
    assert scores["scores"]["meteor"] == pytest.approx(200 / 3)
    assert scores["scores"]["bleu"] == pytest.approx(100)
    assert (scores["unavailable"], scores["bootstrap"], scores["evaluation"]["beams"]) == ({}, 7, 10)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["command"] == "python launch/e2e_experiment.py --as-it-was"
    assert (report["jobs"], report["seeds"], report["settings"]["limit"]) == (5, [1], 3)
    assert "| METEOR | 66.67 | - | - |" in (folder / "report.md").read_text(encoding="utf-8")


def test_a_copy_shows_the_commands_that_ran(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "meteor", lambda texts, references: Unavailable("no Java"))
    ran = json.loads((folder / "report.json").read_text(encoding="utf-8"))["commands"]
    assert str(folder / "configs" / "base.yaml") in ran[0]
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    assert e2e_rescore.main(["--out", str(copied)]) == 0
    assert json.loads((copied / "report.json").read_text(encoding="utf-8"))["commands"] == ran
    text = (copied / "report.md").read_text(encoding="utf-8")
    assert ran[0] in text
    assert str(copied) not in text


def test_what_is_still_unavailable_stays_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "meteor", lambda texts, references: Unavailable("no Java here either"))
    assert e2e_rescore.main(["--out", str(folder)]) == 0
    assert "METEOR is not available: no Java here either" in (folder / "report.md").read_text(encoding="utf-8")


def test_what_does_not_belong_together_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated = folder / "evaluations" / "lora-seed1"
    predictions = (evaluated / "predictions.jsonl").read_bytes()
    (evaluated / "predictions.jsonl").write_bytes(predictions[: predictions.find(b"\n") + 1])
    assert e2e_rescore.main(["--out", str(folder)]) == 4
    assert "has 1 of 3 predictions: bring it whole" in capsys.readouterr().err
    (evaluated / "predictions.jsonl").write_bytes(predictions)
    identity = json.loads((evaluated / "evaluation.json").read_text(encoding="utf-8"))
    write_json(evaluated / "evaluation.json", {**identity, "data": "another"})
    assert e2e_rescore.main(["--out", str(folder)]) == 4
    assert "is of other data than" in capsys.readouterr().err
    (folder / "settings.json").unlink()
    assert e2e_rescore.main(["--out", str(folder)]) == 2
    assert "it has no settings.json or report" in capsys.readouterr().err

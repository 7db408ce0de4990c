# SPDX-License-Identifier: Apache-2.0
"""launch/e2e_experiment.py: what its corpus may hold, how stages end, and all of it at the smallest size."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from data_prep.__main__ import main as data_prep
from launch import e2e_experiment
from launch.e2e_corpus import held_out, plain, prepare
from launch.e2e_experiment import Stages, TimeIsOver, experiment
from launch.e2e_experiment import _side_by_side as side_by_side
from launch.e2e_plan import BASE, Settings, configuration, evaluation, seeds_of
from lora_megatron.config import parse_config
from lora_megatron.data.parquet import open_examples
from lora_megatron.errors import CheckpointError, ConfigError, DataError, UserError

NAMES = ["Aromi", "Bibimbap", "Clowns", "Cotto", "Fitzbillies", "Giraffe", "Loch Fyne", "Strada", "Zizzi", "Wildwood"]
AREAS = ("riverside", "city centre")


def write_raw(folder: Path, *, leaked: str | None = None) -> Path:
    """A few rows in each of the published forms; DART repeats a sentence of E2E's, and one more that may be leaked."""
    for name in ("e2e", "webnlg", "dart", "gpt2_bpe"):
        (folder / name).mkdir(parents=True)
    for file, kind in (("devset.csv", "pub"), ("testset_w_refs.csv", "coffee shop")):
        with open(folder / "e2e" / file, "w", newline="", encoding="utf-8") as stream:
            rows = [
                (f"name[{name}], eatType[{kind}], area[{area}]", text.format(name, kind, area))
                for name in NAMES
                for area in AREAS
                for text in ("{} is a {} in the {}.", "In the {2}, there is the {1} {0}.")
            ]
            csv.writer(stream).writerows([("mr", "ref"), *rows])
    entries = [
        {
            str(number): {
                "category": "Food",
                "size": "1",
                "xml_id": f"Id{number}",
                "modifiedtripleset": [{"subject": name, "property": "dish", "object": "rice"}],
                "lexicalisations": [{"comment": "good", "lang": "en", "lex": f"{name} serves rice."}],
            }
        }
        for number, name in enumerate(NAMES)
    ]
    (folder / "webnlg" / "dev.json").write_text(json.dumps({"entries": entries}), encoding="utf-8")
    texts = [f"{NAMES[0]} is a pub in the {AREAS[0]}.", f"{NAMES[1]} serves rice!", "Strada has tables."]
    dart = [
        {"tripleset": [[f"thing {number}", "is", "so"]], "annotations": [{"source": "e2e", "text": text}]}
        for number, text in enumerate([*texts, *([leaked] if leaked else [])])
    ]
    (folder / "dart" / "dart-v1.1.1-full-dev.json").write_text(json.dumps(dart), encoding="utf-8")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "<|endoftext|>"])}
    (folder / "gpt2_bpe" / "encoder.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "gpt2_bpe" / "vocab.bpe").write_text("#version: 0.2\n", encoding="utf-8")
    return folder


def prepare_here(*arguments: str) -> None:
    assert data_prep(list(arguments)) == 0


def texts_of(path: Path) -> list[tuple[str, str]]:
    return [(context, target) for _, context, target in open_examples(path)]


def test_the_corpus_has_nothing_of_the_test_set_and_what_is_held_out_is_apart(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    leaked = f"{NAMES[2]} is a coffee shop, in the {AREAS[1]}"  # of the test set, in another spelling
    raw = write_raw(tmp_path / "raw", leaked=leaked)
    facts = prepare(raw, out, prepare_by=prepare_here, rows=None)
    parts = {name: texts_of(out / "data" / "e2e" / f"{name}.parquet") for name in ("train", "validation", "test")}
    assert sum(map(len, parts.values())) == 4 * len(NAMES) * len(AREAS)
    assert parts["validation"]
    assert not {c for c, _ in parts["train"]} & {c for c, _ in parts["validation"]}
    corpus = {
        name: [text for _, text in texts_of(out / "data" / "corpus" / f"{name}.parquet")]
        for name in ("train", "validation")
    }
    for name, other in (("train", "validation"), ("validation", "train")):
        assert {sentence for _, sentence in parts[name]} <= set(corpus[name])
        assert not {sentence for _, sentence in parts[other]} & set(corpus[name])
        contexts = [text.partition("\n")[0] for text in corpus[name] if "\n" in text]
        assert contexts
        assert {held_out(context) for context in contexts} == {name == "validation"}
    everything = [*corpus["train"], *corpus["validation"]]
    assert not {plain(t.rpartition("\n")[2]) for t in everything} & {plain(t) for _, t in parts["test"]}
    assert len(everything) == len(set(everything)) == 2 * len(NAMES) * len(AREAS) + len(NAMES) + 1
    assert "thing 2 | is | so\nStrada has tables." in everything
    assert facts["left_out_of_webnlg_and_dart"] == 3  # E2E's two, and WebNLG's in another spelling
    assert facts["corpus_texts"] == {name: len(texts) for name, texts in corpus.items()}


def test_a_development_set_with_a_sentence_of_the_test_set_is_refused(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw")
    with open(raw / "e2e" / "devset.csv", "a", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerow(("name[X]", f"{NAMES[0]} is a coffee shop in the {AREAS[0]}."))
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="a sentence of E2E's test set"):
        prepare(raw, tmp_path / "out", prepare_by=prepare_here, rows=None)


def test_a_tenth_of_the_meanings_is_held_out() -> None:
    assert 60 < sum(held_out(f"name[{number}]") for number in range(1000)) < 140


def test_both_methods_train_alike_but_for_what_is_trained_and_its_learning_rate(tmp_path: Path) -> None:
    settings = Settings(raw=tmp_path, out=tmp_path / "out", lora_lr=3e-3, full_lr=2e-4, shrink=("model.preset=tiny",))
    assert settings.adaptations == [f"{method}-seed{seed}" for seed in (1, 2, 3) for method in ("lora", "full")]
    lora, full = (configuration(f"{method}-seed2", settings) for method in ("lora", "full"))
    for tree in (lora, full, configuration(BASE, settings)):
        parse_config(tree)
    assert (lora["optimizer"].pop("lr"), full["optimizer"].pop("lr")) == (3e-3, 2e-4)
    assert lora.pop("method") == {"name": "lora", "targets": {"q": 4, "v": 4}, "alpha": 32.0, "dropout": 0.1}
    assert full.pop("method") == {"name": "full"}
    assert (lora.pop("run"), full.pop("run")) != (None, None)
    assert lora == full
    assert lora["train"]["seed"] == 2
    assert lora["base"]["weights"] == str(settings.out / "base" / "best")
    assert "model.preset=tiny" not in evaluation("lora-seed2", settings)
    assert str(settings.out / "lora-seed2" / "best") in evaluation("lora-seed2", settings)
    assert f"base.weights={settings.out / 'full-seed2' / 'best'}" in evaluation("full-seed2", settings)
    assert "--adapter" not in evaluation(BASE, settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"jobs": 0}, "--jobs 0"),
        ({"stop_after": 0.5}, "--stop-after 0.5"),
        ({"stop_after": float("nan")}, "--stop-after nan"),
        ({"lora_lr": float("nan")}, "--lora-lr nan"),
        ({"shrink": ("preset",)}, "'preset'"),
    ],
)
def test_settings_that_cannot_be_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings(**{"raw": tmp_path, "out": tmp_path, **change})


@pytest.mark.parametrize("text", ["", "1,1", "-1", "one", "1,", "9" * 25])
def test_seeds_that_cannot_be_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match="--seeds"):
        seeds_of(text)


def test_a_missing_file_and_a_strange_folder_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, out = write_raw(tmp_path / "raw"), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    arguments = ["--raw", str(raw), "--out", str(out)]
    assert e2e_experiment.main(arguments) == 2
    assert "holds something else" in capsys.readouterr().err
    (raw / "webnlg" / "dev.json").unlink()
    assert e2e_experiment.main(arguments) == 3
    error = capsys.readouterr().err
    assert "has no webnlg/dev.json" in error
    assert error.startswith("error: ")
    assert error.count("error") == 1
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def stages_in(folder: Path, **settings: Any) -> Stages:
    (folder / "logs").mkdir(parents=True)
    return Stages(Settings(raw=folder, out=folder, **settings))


def test_a_stage_that_fails_ends_in_its_own_line(tmp_path: Path) -> None:
    stages = stages_in(tmp_path)
    with pytest.raises(DataError, match=r"^base: no such file .*base.log"):
        stages.run("base", [sys.executable, "-c", "print('error: no such file'); raise SystemExit(3)"])
    with pytest.raises(UserError, match=r"^base: a stage ended with status 1.* ZeroDivisionError"):
        stages.run("base", [sys.executable, "-c", "1 / 0"])
    assert not (tmp_path / "timeline.json").exists()


def test_a_stage_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    stages = stages_in(tmp_path, stop_after=1.0)
    began = time.monotonic()
    with pytest.raises(TimeIsOver, match="the same command goes on"):
        stages.run("base", [sys.executable, "-c", "import time; time.sleep(60)"])
    assert time.monotonic() - began < 20


def test_a_run_that_fails_leaves_the_others_alone_and_is_what_is_told(tmp_path: Path) -> None:
    stages, failed = stages_in(tmp_path), threading.Event()

    def fail() -> None:
        failed.set()
        stages.run("one", [sys.executable, "-c", "print('error: too much'); raise SystemExit(4)"])

    def go_on() -> None:
        assert failed.wait(20)
        stages.run("two", [sys.executable, "-c", "import time; time.sleep(2)"])

    with pytest.raises(CheckpointError, match=r"^one: too much"):
        side_by_side([fail, go_on], 2, stages.cancelled)
    assert list(json.loads((tmp_path / "timeline.json").read_text(encoding="utf-8"))["stages"]) == ["two"]


def test_when_the_time_is_over_what_waits_does_not_begin(tmp_path: Path) -> None:
    stages, began = stages_in(tmp_path, stop_after=1.0), time.monotonic()
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(TimeIsOver, match="the same command goes on"):
        side_by_side(
            [lambda name=name: stages.run(name, command) for name in ("one", "two", "three")], 2, stages.cancelled
        )
    assert time.monotonic() - began < 20
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["one.log", "two.log"]


@pytest.mark.slow
def test_the_report_of_a_failed_experiment_names_what_is_missing(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw")
    settings = Settings(raw=raw, out=tmp_path / "out", seeds=(1,), shrink=("train.stepps=3",))
    with pytest.raises(ConfigError, match=r"^base: .*stepps"):
        experiment(settings)
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["missing"] == ["base", "lora-seed1", "full-seed1"]
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "**Missing: base, lora-seed1, full-seed1.**" in text
    assert "| BLEU | - | - | - |" in text


@pytest.mark.slow
def test_the_whole_at_its_smallest_and_again(tmp_path: Path) -> None:
    """Two seeds; then another start finds all but one evaluation, whose scores are gone."""
    raw, out = write_raw(tmp_path / "raw"), tmp_path / "out"
    shrink = "model.preset=tiny model.vocab_size=257 train.precision=fp32 train.warmup_steps=0 "
    shrink += "data.sequence_length=160 data.global_batch_size=8 data.micro_batch_size=8"
    command = [sys.executable, e2e_experiment.__file__, "--raw", str(raw), "--out", str(out), "--seeds", "1,2"]
    command += ["--jobs", "2", "--pretrain-steps", "12", "--adapt-epochs", "1.5", "--lora-lr", "0.01", "--full-lr"]
    command += ["0.003", "--limit", "3", "--base-limit", "2", "--shrink", shrink]
    first = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert first.returncode == 0, first.stderr
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["missing"] == []
    assert report["summary"]["lora"]["runs"] == report["summary"]["full"]["runs"] == 2
    runs = report["runs"]
    assert {name: run["test"]["instances"] for name, run in runs.items()} == {
        BASE: 2,
        **dict.fromkeys(("lora-seed1", "full-seed1", "lora-seed2", "full-seed2"), 3),
    }
    mean = (runs["full-seed1"]["test"]["scores"]["rouge_l"] + runs["full-seed2"]["test"]["scores"]["rouge_l"]) / 2
    assert report["summary"]["full"]["rouge_l"]["mean"] == pytest.approx(mean)
    assert runs["lora-seed1"]["training"]["trainable_parameters"] == 2 * 2 * 2 * 4 * 64
    for name in ("lora-seed1", "full-seed1"):
        loss = runs[name]["training"]["held_out_loss"]
        assert loss["before"] == pytest.approx(runs["full-seed2"]["training"]["held_out_loss"]["before"], abs=1e-6)
        assert runs[name]["training"]["best"]["value"] < loss["before"]  # it did learn, from the same base
    answers = [example["answers"] for example in report["examples"]]
    assert answers
    assert all(set(a) == {BASE, "lora-seed1", "full-seed1"} for a in answers)
    assert any(a[BASE] != a["lora-seed1"] != a["full-seed1"] for a in answers)  # each was evaluated itself
    scores = out / "evaluations" / "full-seed2" / "scores.json"
    before = json.loads(scores.read_text(encoding="utf-8"))
    scores.unlink()
    again = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert again.returncode == 0, again.stderr
    assert [line for line in again.stderr.splitlines() if "begins" in line and "full-seed2-test" not in line] == []
    assert json.loads(scores.read_text(encoding="utf-8")) == before
    timeline = json.loads((out / "timeline.json").read_text(encoding="utf-8"))
    assert len(timeline["wall_seconds"]) == 2
    assert timeline["stages"]["full-seed2-test"]["start"] == 2
    other = subprocess.run([*command, "--limit", "2"], capture_output=True, text=True, timeout=300, check=False)
    assert other.returncode == 2
    assert "holds an experiment with limit = 3" in other.stderr

# SPDX-License-Identifier: Apache-2.0
"""What a user can get wrong at `bench` ends as one line that names the value and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_megatron.__main__ import main
from tests.bench.benches import bench, make_tree
from tests.commands.runs import Outcome, names_in
from tests.pool import Pool


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"methods": ["lora", "ful"]}, "unknown method 'ful' in --methods: did you mean full?"),
        ({"methods": [""]}, "unknown method '' in --methods"),
        ({"methods": ["lora", "full", "lora"]}, "--methods names lora twice"),
        ({"steps": 0}, "--steps 0: at least 1 step"),
        ({"warm_up": -1}, "--warm-up -1: must be 0 or more"),
        ({"layers": 0}, "--layers 0: the model has 4 layers, so a slice of it has 1 to 4"),
        ({"layers": 5}, "--layers 5: the model has 4 layers"),
    ],
)
def test_arguments(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    outcome = bench(make_tree(), str(tmp_path / "out"), **options)
    assert outcome.status == 2
    assert said in outcome.message
    assert "\n" not in outcome.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sections", "options", "status", "said"),
    [
        ({"parallel": {"tensor": 2}}, {}, 2, "start a multiple of 2 processes"),
        (
            {"train": {"recompute": "full", "recompute_unit": 2}},
            {"layers": 3},
            2,
            "--layers 3: 2 layers are recomputed together, so choose a multiple of train.recompute_unit = 2",
        ),
        ({"parallel": {"pipeline": 3}}, {}, 2, "does not divide model.num_layers = 4"),
        ({"method": {"layers": {"3": {"q": 8}}}}, {"layers": 2}, 2, "method.layers gives layers different ranks"),
        (
            {"model": {"sliding_window": 4, "full_attention_layers": 1}},
            {"layers": 2},
            2,
            "model.full_attention_layers = 1: only some layers see everything",
        ),
        ({}, {"layers": 2, "methods": ["ft_top2"]}, 2, "ft_top2 trains the last 2 layers, and the smaller slice"),
        ({"base": {"weights": "nowhere"}}, {}, 4, "base.weights = nowhere is neither random nor a folder"),
        ({"base": {"storage": "nf4"}}, {}, 2, "base.storage = nf4"),
        ({"data": {"tokenizer": "nowhere"}, "model": {"vocab_size": None}}, {}, 3, "tokenizer 'nowhere'"),
        ({"data": {"global_batch_size": 3, "micro_batch_size": 2}}, {}, 2, "data.global_batch_size = 3"),
        ({"optimizer": {"lr": 1e30, "clip_grad": 0.0}}, {"steps": 4}, 5, "lower optimizer.lr"),
    ],
)
def test_configurations(
    tmp_path: Path, sections: dict[str, Any], options: dict[str, Any], status: int, said: str
) -> None:
    outcome = bench(make_tree(**sections), str(tmp_path / "out"), **options)
    assert outcome.status == status, outcome
    assert said in outcome.message
    assert "\n" not in outcome.message


@pytest.mark.parametrize(
    ("name", "text"),
    [("notes.txt", "mine"), ("report.json", '{"method": "lora"}'), ("report.json", "not JSON"), ("report.json", "[1]")],
)
def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    outcome = bench(make_tree(), str(tmp_path))
    assert outcome == Outcome(2, f"--out {tmp_path} holds {name}, which no bench has written: choose another folder")
    assert names_in(tmp_path) == [name]
    assert (tmp_path / name).read_text() == text


def test_a_file_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    outcome = bench(make_tree(), str(tmp_path / "out"))
    assert outcome.status == 2
    assert "is a file: choose a folder" in outcome.message


def test_the_command_line_needs_no_tokenizer_and_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Data files and a tokenizer's folder that are not there stop nothing where model.vocab_size is given."""
    tree = make_tree(data={"train": "nowhere.parquet", "tokenizer": "nowhere", "packing": True})
    config, out = tmp_path / "config.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump(tree))
    command = ["bench", str(config), "--methods", "lora", "--steps", "1", "--layers", "4", "--out", str(out)]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "tokens per second and rank" in said.out
    assert f"report: {out}/report.md" in said.err
    assert (out / "bench.png").exists()
    assert main([*command[:-1], str(config)]) == 2
    assert capsys.readouterr().err.startswith("error: --out")


@pytest.mark.parametrize("train", [{"recompute": "auto"}, {"recompute": "full", "recompute_layers": 2}])
def test_a_slice_does_not_stand_for_a_share_of_layers(pool: Pool, tmp_path: Path, train: dict[str, Any]) -> None:
    (outcome,) = pool.run(1, bench, tree=make_tree(train=train), out=str(tmp_path / "out"), layers=2)
    assert outcome.status == 2
    assert "recompute another share of a slice than of the whole" in outcome.message

# SPDX-License-Identifier: Apache-2.0
"""Whole models: what full fine-tuning saves is a base for later runs under any layout, and no other is taken for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lora_megatron.checkpoint.base import base_tensor_names, describe_base, random_base, read_shape
from lora_megatron.checkpoint.folder import read_manifest
from tests.checkpoint.seal import reseal
from tests.commands.runs import Outcome, Tree, attempt, held_out_of, make_tree, names_in, nothing_begun
from tests.pool import Pool

LLAMA = {
    "preset": "tiny-llama",
    "num_layers": 4,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "max_position_embeddings": 32,
}


def held_out_with(base: Path, corpus: Path, run: Path, parallel: Tree) -> Tree:
    """A run that trains nothing and evaluates a fresh LoRA adapter, which is the base itself."""
    tree = make_tree(corpus, run, parallel=parallel, base={"weights": str(base)}, train={"steps": 0, "eval_every": 1})
    return {**tree, "model": {}}


@pytest.mark.parametrize("model", [{}, LLAMA], ids=["gpt, tied", "llama, untied"])
def test_a_model_trained_at_tp2_pp2_is_the_same_base_everywhere(
    pool: Pool, corpus: Path, tmp_path: Path, model: Tree
) -> None:
    run = tmp_path / "full"
    tree = make_tree(corpus, run, method={"name": "full"}, parallel={"tensor": 2, "pipeline": 2}, train={"steps": 2})
    tree["model"] = model or tree["model"]
    assert pool.run(4, attempt, tree=tree) == [Outcome()] * 4
    folder = run / "model"
    assert not (run / "adapter").exists()
    assert names_in(folder) == [
        "config.json",
        "manifest.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    assert not set(files[0]) & set(files[1])
    shape = read_shape(folder)
    assert set(files[0]) | set(files[1]) == base_tensor_names(shape) == set(read_manifest(folder)["tensors"])
    assert files[0]["embedding.word_embeddings.weight"].shape == (258, shape.hidden_size)

    expected = held_out_of(run)
    layouts: list[tuple[int, Tree]] = [
        (4, {"tensor": 2, "pipeline": 2}),
        (1, {}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        (2, {"tensor": 2, "sequence": True}),
    ]
    for index, (world, parallel) in enumerate(layouts):
        again = tmp_path / str(index)
        outcomes = pool.run(world, attempt, tree=held_out_with(folder, corpus, again, parallel))
        assert outcomes == [Outcome()] * world
        # Not to the bit even on the same layout: a product's rounding depends on where in memory its operands lie.
        assert held_out_of(again) == pytest.approx(expected, rel=1e-6)


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained whole model; copy it before changing it."""
    run = tmp_path_factory.mktemp("base") / "run"
    assert attempt(make_tree(corpus, run, method={"name": "full"}, train={"steps": 1})) == Outcome()
    return run / "model"


def refused(corpus: Path, folder: Path, tmp_path: Path, **sections: Tree) -> Outcome:
    run = tmp_path / "run"
    outcome = attempt(make_tree(corpus, run, base={"weights": str(folder)}, **sections))
    assert nothing_begun(run)
    assert "\n" not in outcome.message
    return outcome


def test_a_base_that_is_missing_or_something_else(corpus: Path, base: Path, tmp_path: Path) -> None:
    outcome = refused(corpus, tmp_path / "none", tmp_path)
    assert (outcome.status, outcome.message) == (
        4,
        f"base.weights = {tmp_path / 'none'} is neither random nor a folder",
    )
    for folder, word in (
        (base.parent, f"did you mean {base}?"),
        (base.parent / "checkpoints" / "step-00000001", "config.json"),
    ):
        outcome = refused(corpus, folder, tmp_path)
        assert (outcome.status, word in outcome.message) == (4, True)


@pytest.mark.parametrize("fault", ["flipped", "truncated", "missing", "config flipped", "manifest flipped"])
def test_a_damaged_base_is_named(corpus: Path, base: Path, tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    kind, _, _ = fault.partition(" ")
    name = {"config": "config.json", "manifest": "manifest.json"}.get(kind, "model-00001-of-00001.safetensors")
    path = folder / name
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(data[:-4])
    else:
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    outcome = refused(corpus, folder, tmp_path)
    assert outcome.status == 4
    assert str(path) in outcome.message


def test_a_base_of_another_shape_vocabulary_or_tokenizer(corpus: Path, base: Path, tmp_path: Path) -> None:
    outcome = refused(corpus, base, tmp_path, model={"num_layers": 2, "num_query_groups": 2})
    assert outcome.status == 4
    assert "num_layers is 4, not 2" in outcome.message
    assert "num_query_groups is 4, not 2" in outcome.message
    outcome = refused(corpus, base, tmp_path, model={"vocab_size": 300})
    assert (outcome.status, "vocab_size is 258, not 300" in outcome.message) == (4, True)

    folder = tmp_path / "model"
    for values, word in (
        ({"tokenizer_fingerprint": "0" * 64}, "another tokenizer"),
        ({"shape": None}, "not written by"),
    ):
        shutil.copytree(base, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))
        reseal(folder)
        outcome = refused(corpus, folder, tmp_path)
        assert word in outcome.message
        assert outcome.status in (2, 4)
        shutil.rmtree(folder)


def test_a_small_vocabulary_names_both(base: Path, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    config["shape"]["vocab_size"] = 100
    (folder / "config.json").write_text(json.dumps(config))
    reseal(folder)
    run = tmp_path / "run"
    outcome = attempt({**make_tree(corpus, run, base={"weights": str(folder)}), "model": {}})
    assert outcome.status == 2
    assert "has a vocabulary of 100" in outcome.message
    assert "needs 258" in outcome.message
    assert nothing_begun(run)


def test_a_base_is_its_content(base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "moved"
    shutil.copytree(base, copy)
    one, other = (describe_base(folder) for folder in (base, copy))
    assert one.fingerprint == other.fingerprint
    assert one.shape == other.shape
    first, second = (random_base(one.shape, seed=seed) for seed in (1, 2))
    assert first.fingerprint != second.fingerprint


def test_the_folder_of_a_run_is_not_its_model(base: Path, corpus: Path, tmp_path: Path) -> None:
    outcome = refused(corpus, base.parent, tmp_path)
    assert outcome.status == 4
    assert f"base.weights = {base.parent} is the folder of a run: did you mean {base}?" in outcome.message

# SPDX-License-Identifier: Apache-2.0
"""`method.start_from`: an adapter that is not exactly this run's is refused in one line, on all ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.seal import reseal
from tests.commands.runs import Outcome, Tree, attempt, make_tree, names_in, nothing_begun
from tests.pool import Pool


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a short run; copy it before changing it."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert attempt(make_tree(corpus, run, train={"steps": 2})) == Outcome()
    return run / "adapter"


def edit_json(name: str, change: Callable[[Tree], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return edit


def start_from(corpus: Path, folder: Path, run: Path, **sections: Tree) -> Outcome:
    tree = make_tree(corpus, run, train={"steps": 1}, **sections)
    tree["method"] = {**tree["method"], "start_from": str(folder)}
    outcome = attempt(tree)
    if outcome.status:
        assert "\n" not in outcome.message
        assert nothing_begun(run)
    return outcome


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.3.mlp.fc2.lora_B.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (edit_tensors(lambda t: t.pop(A)), ["1 tensors are missing", A]),
        (edit_tensors(lambda t: t.update({"more": t[A].clone()})), ["1 tensors are not used", "more"]),
        (
            edit_tensors(lambda t: t.update({"../../outside": t[A].clone()})),
            ["1 tensors are not used", "../../outside"],
        ),
        (edit_tensors(lambda t: t.update({A + "x": t.pop(A)})), ["1 tensors are missing", A]),
        (edit_tensors(lambda t: t[B].fill_(torch.nan)), [B, "not finite"]),
        (edit_tensors(lambda t: t[A][0].fill_(torch.inf)), [A, "not finite"]),
        (edit_tensors(lambda t: t.update({A: t[A].double()})), [A, "dtype F64"]),
        (edit_tensors(lambda t: t.update({A: t[A].to(torch.int32)})), [A, "dtype I32"]),
        (edit_tensors(lambda t: t.update({A: t[A][:1].clone()})), [A, "shape (1, 32), this model needs (2, 32)"]),
        (edit_json("adapter_config.json", lambda c: c.update(r=9)), ["adapter_config.json: r is 9"]),
        (edit_json("adapter_config.json", lambda c: c.update(lora_alpha=80000)), ["lora_alpha is 80000", "16.0"]),
        (edit_json("adapter_config.json", lambda c: c.update(target_modules=["q_proj"])), ["target_modules"]),
        (
            lambda folder: (folder / "adapter_config.json").write_text('{"r": 2, "r": 3}'),
            ["adapter_config.json", "'r' appears twice"],
        ),
        (lambda folder: (folder / "adapter_config.json").write_text('{"r": NaN}'), ["it contains NaN"]),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 200),
            ["is not a readable safetensors file"],
        ),
        (edit_json("manifest.json", lambda m: m["adapter"].update(alpha=8.0)), ["alpha is 8.0, this run has 16.0"]),
        (edit_json("manifest.json", lambda m: m["adapter"]["ranks"].update({"1.v": 7})), ["rank of v in layer 1 is 7"]),
        (edit_json("manifest.json", lambda m: m.pop("adapter")), ["is not an adapter"]),
    ],
)
def test_an_edited_adapter_is_refused_even_with_a_fitting_manifest(
    corpus: Path, trained: Path, tmp_path: Path, edit: Callable[[Path], None], words: list[str]
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(trained, folder)
    edit(folder)
    reseal(folder)
    outcome = start_from(corpus, folder, tmp_path / "run")
    assert outcome.status == 4
    for word in words:
        assert word in outcome.message


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"base": {"seed": 9}}, ["was trained on another base", "give base.weights"]),
        ({"model": {"num_layers": 2}}, ["was trained on another base"]),
        ({"model": {"hidden_size": 64}}, ["was trained on another base"]),
        ({"model": {"num_attention_heads": 2}}, ["was trained on another base"]),
        ({"model": {"vocab_size": 300}}, ["was trained on another base"]),
        ({"method": {"targets": {"q": 4, "v": 3, "fc2": 1}}}, ["rank of q in layer 0 is 2, this run has 4"]),
        ({"method": {"targets": {"q": 2, "v": 3}}}, ["rank of fc2 in layer 0 is 1, this run has none"]),
        ({"method": {"alpha": 32}}, ["alpha is 16.0, this run has 32.0"]),
        ({"method": {"scaling": "rslora"}}, ["rank_stabilised is False, this run has True"]),
        ({"method": {"name": "bitfit"}}, ["method is 'lora', this run has 'bitfit'"]),
    ],
)
def test_an_adapter_of_another_run_is_refused(
    corpus: Path, trained: Path, tmp_path: Path, sections: dict[str, Tree], words: list[str]
) -> None:
    outcome = start_from(corpus, trained, tmp_path / "run", **sections)
    assert outcome.status == 4
    for word in words:
        assert word in outcome.message


def test_a_damaged_or_missing_adapter_is_refused(corpus: Path, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(trained, folder)
    tensors = folder / "adapter_model.safetensors"
    whole = tensors.read_bytes()
    for content, word in ((whole[:-9], "bytes, the manifest says"), (whole[:-9] + b"123456789", "is damaged")):
        tensors.write_bytes(content)
        outcome = start_from(corpus, folder, tmp_path / "run")
        assert (outcome.status, word in outcome.message) == (4, True)
    missing = start_from(corpus, tmp_path / "none", tmp_path / "run")
    assert missing.status == 4
    assert f"method.start_from = {tmp_path}/none is not the folder of an adapter" in missing.message
    run = start_from(corpus, trained.parent, tmp_path / "run")
    assert f"did you mean {trained}?" in run.message


def test_nan_on_one_rank_only_stops_both(pool: Pool, corpus: Path, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(trained, folder)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    edit_tensors(lambda tensors: tensors[name][-1].fill_(torch.nan))(folder)  # a row of tensor rank 1
    reseal(folder)
    outcomes = pool.run(2, start_from, corpus=corpus, folder=folder, run=tmp_path / "run", parallel={"tensor": 2})
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].status == 4
    assert outcomes[0].message.endswith("holds values that are not finite (on rank 1)")


def test_training_goes_on_from_an_adapter_and_replaces_its_own(corpus: Path, trained: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    assert start_from(corpus, trained, tmp_path / "run") == Outcome()
    assert names_in(tmp_path / "run" / "adapter") == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before
    first = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    old = load_file(trained / "adapter_model.safetensors")
    # One step of a small learning rate away from where it started, and B far from the zero of a fresh adapter.
    assert 0 < float((first[B] - old[B]).abs().max()) < 0.02
    assert float(first[B].abs().max()) > 0

# SPDX-License-Identifier: Apache-2.0
"""`lora-megatron inspect` says what a folder is, agrees with what made it, and reads no tensor to say so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from lora_megatron.__main__ import main
from lora_megatron.commands.describe import compact_ranks
from lora_megatron.huggingface.base import describe_hf_base
from lora_megatron.strict_safetensors import TensorSlice
from tests.checkpoint.seal import reseal
from tests.commands.runs import Outcome, attempt, checkpoint_of, make_tree
from tests.huggingface.adapters import make_adapter
from tests.huggingface.models import FAMILIES, make_model, model_class, save_model
from tests.pool import Pool

Facts = dict[str, Any]


class Inspect:
    """Runs the command in this process and reads what it prints; a tensor that is read as a whole is an error."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def _run(self, *arguments: str) -> tuple[int, str, str]:
        self.capsys.readouterr()
        with patch.object(TensorSlice, "__getitem__", side_effect=AssertionError("a tensor is read")):
            status = main(["inspect", *arguments])
        return status, *self.capsys.readouterr()

    def json(self, folder: Path) -> Facts:
        """The one JSON object of a folder."""
        status, out, _ = self._run(str(folder), "--json")
        assert status == 0
        return json.loads(out)

    def table(self, folder: Path) -> dict[str, str]:
        """Field -> value of the table; a value that goes on in a second line is joined."""
        status, out, _ = self._run(str(folder))
        assert status == 0
        assert str(folder) in out.replace("\n", "")
        rows: dict[str, str] = {}
        for line in out.splitlines():
            cells = [cell.strip() for cell in line.strip("│").split("│")]
            if len(cells) == 2:
                name = cells[0] or list(rows)[-1]
                rows[name] = f"{rows.get(name, '')} {cells[1]}".strip()
        return rows

    def refused(self, folder: Path, *words: str) -> None:
        """One line on stderr with each of `words`, and status 4."""
        for arguments in ((str(folder),), (str(folder), "--json")):
            status, out, err = self._run(*arguments)
            assert (status, out) == (4, "")
            assert err.startswith("error: ")
            assert err.count("\n") == 1, err
            for word in words:
                assert word in err


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Inspect:
    return Inspect(capsys)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_hugging_face_model(inspect: Inspect, tmp_path: Path, name: str) -> None:
    folder = save_model(name, tmp_path / "model")
    facts, model = inspect.json(folder), make_model(name)
    assert facts["kind"] == "Hugging Face model"
    assert facts["family"] == model.config.model_type == name
    assert facts["parameters"] == model.num_parameters()
    assert facts["dtypes"] == {"F32": model.num_parameters()}
    assert facts["files"] == {"model.safetensors": (folder / "model.safetensors").stat().st_size}
    assert facts["bytes"] == sum(facts["files"].values())
    assert facts["shape"]["num_layers"] == model.config.num_hidden_layers
    assert facts["shape"]["vocab_size"] == model.config.vocab_size
    assert facts["fingerprint"] == describe_hf_base(folder).fingerprint
    table = inspect.table(folder)
    assert table["family"] == name
    assert table["parameters"] == f"{model.num_parameters():,}"
    assert table["shape: hidden_size"] == "32"
    assert table["fingerprint"] == facts["fingerprint"]


def test_a_sharded_model_of_another_type(inspect: Inspect, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_model("llama").to(torch.bfloat16).save_pretrained(folder, max_shard_size="5KB")
    facts, table = inspect.json(folder), inspect.table(folder)
    assert list(facts["dtypes"]) == ["BF16"]
    assert sorted(facts["files"]) == sorted(path.name for path in folder.glob("*.safetensors"))
    assert table["dtypes"] == "BF16"
    assert table["files in all"] == str(len(facts["files"]))


def save_adapters(folder: Path) -> None:
    base = save_model("llama", folder / "base")
    make_adapter(base, folder / "lora", targets={"q": 4, "v": 4}, layers={"2-3": {"q": 8, "fc1": 2}}, alpha=12.0)
    make_adapter(base, folder / "rslora", targets={"q": 4}, scaling="rslora")
    make_adapter(save_model("opt", folder / "opt"), folder / "bitfit", name="bitfit")


@pytest.fixture(scope="module")
def adapters(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders lora, rslora and bitfit; read only."""
    folder = tmp_path_factory.mktemp("adapters")
    pool.run(1, save_adapters, folder=folder)
    return folder


def test_an_adapter(inspect: Inspect, adapters: Path) -> None:
    facts, table = inspect.json(adapters / "lora"), inspect.table(adapters / "lora")
    assert (facts["kind"], facts["method"], facts["alpha"]) == ("adapter", "lora", 12.0)
    assert facts["ranks"]["2.gate"] == facts["ranks"]["3.up"] == 2
    # q: 32 -> 32, v: 32 -> 16 (two of four heads), gate and up: 32 -> 56
    assert facts["parameters"] == 2 * 4 * 64 + 2 * 8 * 64 + 4 * 4 * 48 + 2 * 2 * 2 * 88
    assert facts["base_fingerprint"] == describe_hf_base(adapters / "base").fingerprint
    assert table["ranks"] == "q 4 in layers 0-1; v 4 in layers 0-3; q 8, gate 2, up 2 in layers 2-3"
    assert (table["alpha"], table["scaling"]) == ("12", "alpha / rank")
    assert inspect.table(adapters / "rslora")["scaling"] == "alpha / sqrt(rank)"
    assert inspect.json(adapters / "bitfit")["method"] == "bitfit"
    assert "ranks" not in inspect.table(adapters / "bitfit")


def test_compact_ranks() -> None:
    assert compact_ranks({"0.q": 8, "1.q": 8, "3.q": 8, "1.v": 4}) == "q 8 in layers 0-1,3; v 4 in layer 1"
    assert compact_ranks({}) == ""


def test_a_peft_adapter(inspect: Inspect, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = model_class("llama")(make_model("llama").config)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=9, target_modules=["q_proj", "o_proj"]))
    wrapped.save_pretrained(tmp_path / "peft")
    facts, table = inspect.json(tmp_path / "peft"), inspect.table(tmp_path / "peft")
    assert (facts["kind"], facts["peft_type"], facts["r"], facts["lora_alpha"]) == ("PEFT adapter", "LORA", 4, 9)
    assert facts["parameters"] == 4 * 2 * 4 * 64
    assert sorted(facts["target_modules"]) == ["o_proj", "q_proj"]
    assert table["r"] == "4"
    (tmp_path / "peft" / "adapter_model.safetensors").rename(tmp_path / "peft" / "adapter_model.bin")
    inspect.refused(tmp_path / "peft", "adapter_model.bin is a pickle", "save_pretrained")


def test_a_run_its_checkpoint_and_a_model(inspect: Inspect, corpus: Path, tmp_path: Path) -> None:
    run, full = tmp_path / "run", tmp_path / "full"
    assert attempt(make_tree(corpus, run, train={"steps": 2})) == Outcome()
    facts, table = inspect.json(run), inspect.table(run)
    assert (facts["kind"], facts["state"], facts["step"]) == ("run", "done", 2)
    assert facts["parts"] == [str(run / "adapter"), str(checkpoint_of(run, 2))]
    assert table["state"] == "done"
    checkpoint = inspect.json(checkpoint_of(run, 2))
    assert (checkpoint["kind"], checkpoint["step"], checkpoint["consumed_samples"]) == ("training checkpoint", 2, 8)
    assert checkpoint["identity"]["sequence_length"] == 16
    assert checkpoint["ranks"] == inspect.json(run / "adapter")["ranks"]
    table = inspect.table(checkpoint_of(run, 2))
    assert table["identity: sequence_length"] == "16"
    assert table["ranks"] == "q 2, v 3, fc2 1 in layers 0-3"

    assert attempt(make_tree(corpus, full, method={"name": "full"}, train={"steps": 1})) == Outcome()
    model = inspect.json(full / "model")
    assert model["kind"] == "model"
    assert model["shape"]["hidden_size"] == 32
    assert model["parameters"] == json.loads((full / "report.json").read_text())["total_parameters"]


def test_what_is_nothing_or_damaged_is_refused(inspect: Inspect, adapters: Path, tmp_path: Path) -> None:
    inspect.refused(tmp_path / "none", "none does not exist", "give the folder")
    (tmp_path / "file").write_text("x")
    inspect.refused(tmp_path / "file", "is a file", "give the folder")
    (tmp_path / "empty").mkdir()
    inspect.refused(tmp_path / "empty", "is none of these", "PEFT adapter")
    folder = tmp_path / "adapter"
    shutil.copytree(adapters / "lora", folder)
    tensors = folder / "adapter_model.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-4])
    inspect.refused(folder, "bytes, the manifest says")
    reseal(folder)
    inspect.refused(folder, "truncated")
    tensors.write_bytes(whole)
    manifest = json.loads((folder / "manifest.json").read_text())
    for wrong in ({"ranks": {"q": 3}}, {"ranks": [3]}, {"ranks": {"0.q": "3"}}, {"alpha": "big"}):
        changed = {**manifest, "adapter": {**manifest["adapter"], **wrong}}
        (folder / "manifest.json").write_text(json.dumps(changed))
        reseal(folder)
        inspect.refused(folder, "does not describe an adapter")
    base = tmp_path / "base"
    shutil.copytree(adapters / "base", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    inspect.refused(base, "'mamba' is not supported", "gpt2, opt")

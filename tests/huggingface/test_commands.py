# SPDX-License-Identifier: Apache-2.0
"""The README's Hugging Face section as a user runs it, on a model with a tokenizer, judged by transformers."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from lora_megatron.__main__ import main
from tests.commands.runs import Outcome, attempt, held_out_of

ROOT = Path(__file__).resolve().parents[2]
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("## Hugging Face models in")[1].split("\n## ")[0]


def make_model(folder: Path) -> None:
    """A tiny GPT-2 with a byte-level tokenizer, as save_pretrained leaves them."""
    import tokenizers
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "<|endoftext|>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=257, n_embd=64, n_layer=2, n_head=4, n_positions=128)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def run_here(words: str, folder: Path) -> None:
    """A command line of ours, in this process: a new one would take three seconds to import what is here already."""
    program, *arguments = shlex.split(words)
    assert program == "lora-megatron"
    with contextlib.chdir(folder):
        assert main(arguments) == 0, words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every command of the section has run, in order; what trains, in processes of its own."""
    folder = tmp_path_factory.mktemp("readme")
    make_model(folder / "path" / "to" / "model")
    (folder / "launch").symlink_to(ROOT / "launch")
    commands = ["python -m data_prep synthetic --domain hotels --seed 1 --rows 40 --held-out-rows 8 --out data/hotels"]
    block = SECTION.split("```bash\n")[1].split("```")[0].replace("\\\n", " ")
    commands += [line.partition("#")[0].strip() for line in block.splitlines() if line.strip()]
    assert len(commands) == 6
    for command in commands[:2]:
        done = run(command, folder)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert "Traceback" not in done.stderr
    for command in commands[2:]:
        run_here(command, folder)
    return folder


def model_at(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def ids_of(folder: Path) -> Tensor:
    from transformers import AutoTokenizer

    text = "name : The Lodge | area : lake"
    ids: Tensor = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    return ids


def test_the_merged_model_is_the_base_with_the_adapter(folder: Path) -> None:
    """Plain transformers loads what merge wrote, tokenizer included, and generates what PEFT generates."""
    import peft

    ids = ids_of(folder / "hf-merged")
    base = model_at(folder / "path" / "to" / "model")
    with torch.no_grad():
        before = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, folder / "hf-peft").eval()
        merged = model_at(folder / "hf-merged")
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=0, atol=1e-5)
        assert (merged(ids).logits - before).abs().max() > 1e-3
        said = [
            m.generate(input_ids=ids, max_new_tokens=20, do_sample=False, pad_token_id=256) for m in (merged, adapted)
        ]
    assert torch.equal(*said)
    assert (folder / "hf-merged" / "tokenizer.json").exists()


def test_the_run_folder_repeats_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = yaml.safe_load((folder / "runs" / "hf" / "config.yaml").read_text(encoding="utf-8"))
    assert config["data"]["tokenizer"] == config["base"]["weights"] == "path/to/model"
    assert (config["model"]["num_layers"], config["model"]["vocab_size"]) == (2, 257)
    report = json.loads((folder / "runs" / "hf" / "report.json").read_text(encoding="utf-8"))
    assert report["held_out_loss"]["after"] < report["held_out_loss"]["before"]
    assert report["trainable_parameters"] == 2 * 2 * (64 + 64) * 8
    monkeypatch.chdir(folder)
    assert attempt({**config, "parallel": {}, "run": {"dir": "runs/again"}}) == Outcome()
    assert held_out_of(Path("runs/again")) == pytest.approx(report["held_out_loss"]["after"], abs=1e-4)


def tree_with(**sections: Any) -> dict[str, Any]:
    """The shipped configuration with other values."""
    tree = yaml.safe_load((ROOT / "launch" / "configs" / "hf_lora.yaml").read_text(encoding="utf-8"))
    return {**tree, **{name: {**tree.get(name, {}), **values} for name, values in sections.items()}}


def test_training_goes_on_from_an_imported_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    tree = tree_with(
        method={"start_from": "adapters/back"}, train={"steps": 1, "warmup_steps": 0}, run={"dir": "runs/on"}
    )
    assert attempt(tree) == Outcome()
    first, on = (json.loads(Path(f"runs/{name}/report.json").read_text(encoding="utf-8")) for name in ("hf", "on"))
    assert on["held_out_loss"]["before"] == pytest.approx(first["held_out_loss"]["after"], abs=1e-4)


def test_the_live_example_runs(folder: Path) -> None:
    example = SECTION.split("```python\n")[1].split("```")[0]
    (folder / "example.py").write_text(example + "\nprint(model.active, sorted(model.adapters))\n")
    done = run("python example.py", folder)
    assert (done.returncode, done.stdout) == (0, "None []\n"), done.stderr


@pytest.mark.parametrize(
    ("sections", "status", "says"),
    [
        ({"base": {"weights": "nowhere"}}, 4, "base.weights = nowhere is neither random nor a folder"),
        ({"model": {"num_layers": 3}}, 4, "num_layers is 2, not 3"),
        ({"data": {"tokenizer": "bytes"}}, 2, "has a vocabulary of 257, the tokenizer bytes needs 258"),
        ({"method": {"targets": {"gate": 4}}}, 2, "this model's MLP has no gate"),
        ({"data": {"sequence_length": 256}}, 2, "longer than model.max_position_embeddings = 128"),
        ({"method": {"start_from": "hf-peft"}}, 4, "lora-megatron import"),
    ],
)
def test_bad_input_ends_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], status: int, says: str
) -> None:
    monkeypatch.chdir(folder)
    outcome = attempt(tree_with(**sections, run={"dir": "runs/bad"}))
    assert outcome.status == status
    assert says in outcome.message
    assert "\n" not in outcome.message
    assert not Path("runs/bad/adapter").exists()
    shutil.rmtree("runs/bad", ignore_errors=True)

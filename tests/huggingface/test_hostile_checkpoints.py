# SPDX-License-Identifier: Apache-2.0
"""Folders that are damaged or hostile are refused in one line; links of the hub's cache are followed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_megatron.errors import CheckpointError
from lora_megatron.huggingface.checkpoint import HfCheckpoint

Saved = Callable[[str], Path]


def edit(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return apply


def index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    """Give the folder an index of its one file, renamed, and change it."""

    def apply(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "weights.safetensors")
        where = dict.fromkeys(load_file(folder / "weights.safetensors"), "weights.safetensors")
        change(where)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))

    return apply


def rename(suffix: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "model.safetensors").rename(folder / f"pytorch_model{suffix}")


FIRST = "transformer.h.0.attn.c_attn.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (edit(lambda t: t.pop(FIRST)), f"1 tensors of its config.json are missing, the first is {FIRST}"),
    "extra": (edit(lambda t: t.update(extra=torch.ones(2))), "1 tensors do not belong to a gpt2"),
    "a layer too many": (
        edit(lambda t: t.update({FIRST.replace("h.0", "h.4"): torch.ones(32, 96)})),
        "the first is transformer.h.4",
    ),
    "another head": (
        edit(lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1})),
        "is stored and is not the embedding",
    ),
    "a head of integers": (
        edit(lambda t: t.update({"lm_head.weight": torch.ones(3).int()})),
        "lm_head.weight has shape",
    ),
    "untransposed": (edit(lambda t: t.update({FIRST: t[FIRST].t().contiguous()})), "has shape [96, 32], its config"),
    "integers": (edit(lambda t: t.update({FIRST: t[FIRST].int()})), "only floating-point weights are supported"),
    "cut short": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-5]),
        "trunc",
    ),
    "a pickle": (rename(".bin"), "pickle files can run code and are never read; convert it"),
    "a pickle by name only": (
        lambda f: (f / "model.safetensors").write_bytes(b"PK\x03\x04" + b"x" * 99),
        "pickle files are refused",
    ),
    "nothing": (lambda f: (f / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
    "index out of the folder": (index(lambda w: w.update({FIRST: "../model.safetensors"})), "no file of this folder"),
    "index to the root": (index(lambda w: w.update({FIRST: "/etc/passwd.safetensors"})), "no file of this folder"),
    "index to a number": (index(lambda w: w.update({FIRST: 7})), "no file of this folder"),  # type: ignore[arg-type]
    "index to a pickle": (index(lambda w: w.update({FIRST: "weights.bin"})), "no file of this folder"),
    "index to no file": (index(lambda w: w.update({FIRST: "none.safetensors"})), "none.safetensors"),
    "index without one": (index(lambda w: w.pop(FIRST)), f"{FIRST} is there and not listed"),
    "index with one more": (
        index(lambda w: w.update({"x": "weights.safetensors"})),
        "x is listed for it and not there",
    ),
    "index of nothing": (index(lambda w: w.clear()), "weight_map must map"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "cannot read"),
    "configuration twice": (
        lambda f: (f / "config.json").write_text('{"model_type": "gpt2", "model_type": 1}'),
        "twice",
    ),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "holds a JSON list"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused(saved: Saved, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved("gpt2"), folder)
    DAMAGE[damage][0](folder)
    with pytest.raises(CheckpointError) as caught:
        HfCheckpoint(folder)
    assert DAMAGE[damage][1] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_link_out_of_the_folder_is_followed(saved: Saved, tmp_path: Path) -> None:
    """The hub's cache keeps every file as a link into another folder; a path in an index cannot lead there."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for path in saved("gpt2").iterdir():
        (folder / path.name).symlink_to(path)
    with HfCheckpoint(folder) as linked, HfCheckpoint(saved("gpt2")) as real:
        assert linked.fingerprint() == real.fingerprint()


def test_a_fingerprint_sees_weights_and_shape_and_not_files(saved: Saved, tmp_path: Path) -> None:
    prints = set()
    for name in ("gpt2", "opt", "llama", "mistral"):
        with HfCheckpoint(saved(name)) as checkpoint:
            prints.add(checkpoint.fingerprint())
    assert len(prints) == 4
    for number, change in enumerate((lambda t: t[FIRST][0, 0].add_(1), lambda t: None)):
        folder = tmp_path / str(number)
        shutil.copytree(saved("gpt2"), folder)
        edit(change)(folder)  # type: ignore[arg-type]  # either way the file is written anew
        index(lambda where: None)(folder)
        with HfCheckpoint(folder) as checkpoint:
            assert (checkpoint.fingerprint() in prints) == (number == 1)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.sampled_from(["config.json", "model.safetensors.index.json"]))
def test_any_bytes_are_refused(saved: Saved, tmp_path: Path, content: bytes, name: str) -> None:
    folder = tmp_path / "fuzzed"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((saved("gpt2") / "config.json").read_bytes())
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError):
        HfCheckpoint(folder)

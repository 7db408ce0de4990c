# SPDX-License-Identifier: Apache-2.0
"""Adapters loaded into, switched on and unloaded from a live sharded model whose base stays as it is."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_megatron.errors import CheckpointError, ConfigError
from lora_megatron.evaluation.live import LiveModel, load_adapter, open_model, switch, unload
from lora_megatron.parallel.groups import Layout
from tests.huggingface.adapters import make_adapter
from tests.huggingface.logits import logits_of
from tests.huggingface.models import tokens
from tests.pool import Pool

LAYOUT = Layout(tensor=2, pipeline=2, sequence=True)


def prepare(base: Path, folder: Path) -> dict[str, Tensor]:
    """Two adapters of `base`, of all projections and of some, and the logits of the models they were saved from."""
    first = make_adapter(base, folder / "one" / "adapter", seed=1)
    logits = {"one": logits_of(first, tokens())}
    second = make_adapter(base, folder / "two", seed=2, targets={"v": 3}, layers={"1": {"v": 0, "fc2": 2}})
    return {**logits, "two": logits_of(second, tokens())}


def base_hash(model: LiveModel) -> str:
    digest = hashlib.sha256()
    for chunk in model.chunks:
        for name, parameter in chunk.named_parameters():
            if ".adapters." not in name:
                digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def live(base: Path, folder: Path) -> dict[str, Any]:
    """On every rank: the logits after each call."""
    model = open_model(base, layout=LAYOUT)
    untouched = base_hash(model)
    seen = {"base": logits_of(model.chunks, tokens())}
    assert load_adapter(model, folder / "one" / "adapter") == "one"
    seen["one"] = logits_of(model.chunks, tokens())
    load_adapter(model, folder / "two", name="zwei")
    assert model.active == "zwei"
    seen["two"] = logits_of(model.chunks, tokens())
    switch(model, "one")
    seen["one again"] = logits_of(model.chunks, tokens())
    switch(model, None)
    seen["base again"] = logits_of(model.chunks, tokens())
    switch(model, "zwei")
    unload(model, "zwei")
    assert (model.active, list(model.adapters)) == (None, ["one"])
    seen["base at last"] = logits_of(model.chunks, tokens())
    assert not any(p.requires_grad for chunk in model.chunks for p in chunk.parameters())
    for call, says in (
        (lambda: switch(model, "zwei"), "no adapter 'zwei' is loaded; loaded are one"),
        (lambda: unload(model, "zwei"), "no adapter 'zwei' is loaded; loaded are one"),
        (lambda: load_adapter(model, folder / "one" / "adapter"), "an adapter 'one' is loaded already"),
    ):
        with pytest.raises(ConfigError, match=says):
            call()
    assert base_hash(model) == untouched
    return seen


def test_adapters_come_and_go(pool: Pool, saved: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("llama", "gpt2"):
        folder = tmp_path / name
        folder.mkdir()
        wanted = pool.run(1, prepare, base=saved(name), folder=folder)[0]
        for seen in pool.run(4, live, base=saved(name), folder=folder):
            for adapter, logits in wanted.items():
                torch.testing.assert_close(seen[adapter], logits, rtol=0, atol=1e-5)
                assert (logits - seen["base"]).abs().max() > 0.05, "the adapter must say something"
            assert torch.equal(seen["one"], seen["one again"])
            assert torch.equal(seen["base"], seen["base again"])
            assert torch.equal(seen["base"], seen["base at last"])


def refusals(base: Path, folders: dict[str, Path]) -> tuple[dict[str, str], bool]:
    """On every rank: what each load is refused with, and whether the model still computes the same."""
    model = open_model(base, layout=LAYOUT)
    before = logits_of(model.chunks, tokens())
    messages = {}
    for name, folder in folders.items():
        with pytest.raises(CheckpointError) as caught:
            load_adapter(model, folder)
        messages[name] = str(caught.value)
    return messages, torch.equal(before, logits_of(model.chunks, tokens())) and model.adapters == {}


def test_a_wrong_adapter_changes_nothing(pool: Pool, saved: Callable[[str], Path], tmp_path: Path) -> None:
    pool.run(1, prepare, base=saved("llama"), folder=tmp_path)
    pool.run(1, other_methods, base=saved("llama"), other=saved("mistral"), folder=tmp_path)
    damaged = tmp_path / "damaged"
    shutil.copytree(tmp_path / "two", damaged)
    path = damaged / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    folders = {
        "damaged": damaged,
        "ft_top2": tmp_path / "ft_top2",
        "mistral": tmp_path / "mistral",
        "missing": tmp_path / "none",
    }
    says = {
        "damaged": "is damaged: its SHA-256 is not the manifest's",
        "ft_top2": "was trained by ft_top2, which changes weights of the base itself",
        "mistral": "was trained on another base",
        "missing": "is not a folder",
    }
    for messages, unchanged in pool.run(4, refusals, base=saved("llama"), folders=folders):
        assert unchanged
        assert set(messages) == set(says)
        for name, text in says.items():
            assert text in messages[name]


def other_methods(base: Path, other: Path, folder: Path) -> None:
    make_adapter(other, folder / "mistral")
    make_adapter(base, folder / "ft_top2", name="ft_top2")

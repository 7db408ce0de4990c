# SPDX-License-Identifier: Apache-2.0
"""`train.attention = fa4` from the configuration to the layers: what is refused, planned and built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_megatron.commands.decoding_model import plan_model
from lora_megatron.config import Config, parse_config
from lora_megatron.errors import ConfigError
from lora_megatron.layers.attention import SdpaAttention
from lora_megatron.methods.choose import choose_method
from lora_megatron.model import attention_kernels
from lora_megatron.model.attention_kernels import check_attention_here
from lora_megatron.model.build import build
from lora_megatron.model.checks import check, check_plan, layout_of, options_of
from lora_megatron.model.presets import resolve_shape
from lora_megatron.model.shape import ModelShape
from lora_megatron.parallel.groups import build_mesh
from tests.commands.runs import attempt, make_corpus, make_tree
from tests.layers.test_flash_attention import Stand, put_in_place
from tests.pool import Pool

FA4 = {"attention": "fa4", "precision": "bf16"}
TINY = {"preset": "tiny", "num_layers": 2}


def config_of(**sections: Any) -> Config:
    return parse_config({"model": TINY, "train": FA4, "data": {"sequence_length": 16}, **sections})


def shape_of(config: Config) -> ModelShape:
    return resolve_shape(config.model, tokenizer_vocab_size=100)


def complain(config: Config, *, plan: bool = False) -> str:
    shape = shape_of(config)
    with pytest.raises(ConfigError) as error:
        (check_plan if plan else check)(config, shape, choose_method(config.method, num_layers=2), 1)
    said = str(error.value)
    assert "\n" not in said
    assert said.startswith("train.attention = fa4")
    assert said.endswith("set train.attention=torch") or "or train.attention=torch" in said
    return said


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"attention": "fa4"}}, ("train.precision = fp32", "set train.precision=bf16")),
        ({"model": {**TINY, "head_dim": 20}}, ("model.head_dim = 20", "multiples of 8 up to 256")),
        ({"model": {**TINY, "head_dim": 264}}, ("model.head_dim = 264",)),
        ({"data": {"packing": True, "sequence_length": 64}}, ("data.packing = true", "masks", "data.packing=false")),
    ],
)
def test_what_no_machine_can_do_is_not_planned_either(sections: dict[str, Any], words: tuple[str, ...]) -> None:
    said = complain(config_of(**sections), plan=True)
    assert all(word in said for word in words), said


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine must have no GPU")
def test_a_machine_without_a_gpu_is_refused_but_can_plan(tmp_path: Path) -> None:
    config = config_of()
    check_plan(config, shape_of(config), choose_method(config.method, num_layers=2), 1)
    said = complain(config)
    assert "no CUDA device" in said
    outcome = attempt(make_tree(make_corpus(tmp_path / "corpus"), tmp_path / "run", train=FA4))
    assert (outcome.status, outcome.message) == (2, said)
    assert not (tmp_path / "run").exists(), "nothing was begun"


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


def here(config: Config) -> str:
    with pytest.raises(ConfigError) as error:
        check_attention_here(config, shape_of(config))
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("set train.attention=torch")
    return str(error.value)


def test_an_older_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (8, 6))
    assert "compute capability 8.6, and FlashAttention 4 needs 9.0" in here(config_of())


def test_wide_heads_are_hoppers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = config_of(model={**TINY, "head_dim": 192})
    pretend(monkeypatch, (10, 0))
    assert "model.head_dim = 192" in here(wide)
    with put_in_place(Stand()):
        widest = config_of(model={**TINY, "head_dim": 256})
        check_attention_here(widest, shape_of(widest))
        pretend(monkeypatch, (9, 0))
        check_attention_here(wide, shape_of(wide))


def test_a_missing_package_and_a_broken_one_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0))

    def missing() -> Any:
        raise ModuleNotFoundError("No module named 'flash_attn'")

    def broken() -> Any:
        raise AttributeError("module 'cutlass' has no attribute\n'cute'")

    monkeypatch.setattr(attention_kernels, "flash_attention_4", missing)
    said = here(config_of())
    assert "flash-attn-4 (No module named 'flash_attn')" in said
    assert "pip install 'flash-attn-4'" in said
    monkeypatch.setattr(attention_kernels, "flash_attention_4", broken)
    assert "AttributeError: module 'cutlass' has no attribute 'cute'" in here(config_of())


def test_nothing_is_asked_of_who_asks_for_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (7, 0))
    config = config_of(train={"precision": "bf16"})
    check_attention_here(config, shape_of(config))


def kernels_of(sections: dict[str, Any]) -> list[str]:
    """Those of each attention layer of a model as configured."""
    config = config_of(**sections)
    build_mesh(layout_of(config), seed=1)
    method = choose_method(config.method, num_layers=2)
    chunks = build(shape_of(config), method, layout_of(config), options_of(config))
    return [layer.kernels for chunk in chunks for layer in chunk.modules() if isinstance(layer, SdpaAttention)]


def test_the_layers_know(pool: Pool) -> None:
    assert pool.run(1, kernels_of, sections={}) == [["fa4", "fa4"]]
    assert pool.run(1, kernels_of, sections={"train": {}}) == [["torch", "torch"]]


def decoding_kernels(tree: dict[str, Any]) -> list[str]:
    chunks, _ = plan_model(parse_config(tree), None).build()
    return [layer.kernels for chunk in chunks for layer in chunk.modules() if isinstance(layer, SdpaAttention)]


def test_decoding_needs_no_flash_attention(pool: Pool, tmp_path: Path) -> None:
    """A configuration that trained with it generates on any machine."""
    tree = make_tree(make_corpus(tmp_path / "corpus"), tmp_path / "run", train=FA4)
    (kernels,) = pool.run(1, decoding_kernels, tree=tree)
    assert set(kernels) == {"torch"}

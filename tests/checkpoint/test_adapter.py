# SPDX-License-Identifier: Apache-2.0
"""The adapter file: no layout in it, PEFT's names and configuration, replaced in one step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state as mpu
from safetensors import safe_open
from safetensors.torch import load_file

from lora_megatron.checkpoint.adapter import describe_method, load_adapter, save_adapter, trained_parameters
from lora_megatron.checkpoint.folder import read_manifest
from lora_megatron.config import MethodSection, ModelSection
from lora_megatron.errors import CheckpointError
from lora_megatron.layers.lora import seed_from
from lora_megatron.layers.sharding import shard_of
from lora_megatron.methods.choose import choose_method
from lora_megatron.model.build import BuildOptions, build
from lora_megatron.model.presets import resolve_shape
from lora_megatron.parallel.groups import Layout, build_mesh
from tests.commands.runs import Tree, names_in
from tests.pool import Pool

ALL = {"q": 4, "k": 1, "v": 2, "o": 3, "fc1": 2, "fc2": 5}
GPT = {"preset": "tiny", "num_layers": 4, "hidden_size": 32}
LLAMA = {
    "preset": "tiny-llama",
    "num_layers": 4,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "ffn_hidden_size": 96,
    "vocab_size": 100,
}
PATTERNED = {"targets": {"q": 4, "v": 2, "fc2": 3}, "layers": {"1-2": {"q": 8}, "3": {"v": 0}}, "scaling": "rslora"}


def _born(model: Tree, method: Tree, layout: Layout) -> tuple[list[Any], Any, Any]:
    shape = resolve_shape(ModelSection(**model), tokenizer_vocab_size=100)
    chosen = choose_method(MethodSection(**method), num_layers=shape.num_layers)
    if not mpu.is_initialized():
        build_mesh(layout, seed=1, timeout_minutes=2)
    return build(shape, chosen, layout, BuildOptions(adapter_seed=3)), chosen, shape


def write_adapter(folder: Path, model: Tree, method: Tree, layout: Layout) -> None:
    """An adapter whose values are a function of the names alone."""
    chunks, chosen, shape = _born(model, method, layout)
    rank, size = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
    with torch.no_grad():
        for named in trained_parameters(chunks, copies=True):
            shard = shard_of(named.parameter)
            full = shard.full_shape(named.parameter.shape, size)
            generator = torch.Generator().manual_seed(seed_from(named.name))
            named.parameter.copy_(shard.part(torch.randn(full, generator=generator), full, rank, size))
    save(folder, chunks, chosen, shape)


def save(folder: Path, chunks: list[Any], method: Any, shape: Any) -> None:
    facts = {"base": "random", "base_fingerprint": "f" * 32, "seed": 3, **describe_method(method, shape)}
    save_adapter(folder, chunks, method, shape, facts)


def reload_adapter(source: Path, target: Path, model: Tree, method: Tree, layout: Layout) -> None:
    """Load into a model with other values and write it again."""
    chunks, chosen, shape = _born(model, method, layout)
    load_adapter(source, chunks, chosen, shape, base_fingerprint="f" * 32)
    save(target, chunks, chosen, shape)


@pytest.mark.parametrize(
    ("model", "method"),
    [
        (GPT, {"targets": ALL}),
        (LLAMA, {"targets": ALL}),
        (GPT, PATTERNED),
        (GPT, {"name": "bitfit"}),
        (LLAMA, {"name": "ft_top2"}),
    ],
    ids=["gpt", "llama", "patterned", "bitfit", "ft_top2"],
)
def test_an_adapter_written_at_tp2_pp2_loads_bit_exactly_everywhere(
    pool: Pool, tmp_path: Path, model: Tree, method: Tree
) -> None:
    first = tmp_path / "first"
    pool.run(4, write_adapter, folder=first, model=model, method=method, layout=Layout(2, 2))
    original = (first / "adapter_model.safetensors").read_bytes()
    stored = load_file(first / "adapter_model.safetensors")
    assert len(stored) >= 12
    assert all(float(tensor.std()) > 0.3 for tensor in stored.values() if tensor.numel() > 50)
    layouts = [
        (1, Layout()),
        (4, Layout(tensor=4)),
        (4, Layout(pipeline=4)),
        (2, Layout(pipeline=2, virtual_pipeline=2)),
    ]
    for index, (world, layout) in enumerate(layouts):
        target = tmp_path / str(index)
        pool.run(world, reload_adapter, source=first, target=target, model=model, method=method, layout=layout)
        assert (target / "adapter_model.safetensors").read_bytes() == original, layout
        assert (target / "adapter_config.json").read_bytes() == (first / "adapter_config.json").read_bytes()


def test_metadata_says_what_the_adapter_is(pool: Pool, tmp_path: Path) -> None:
    pool.run(1, write_adapter, folder=tmp_path / "a", model=GPT, method=PATTERNED, layout=Layout())
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", framework="pt") as handle:
        metadata = handle.metadata()
    assert metadata["format"] == "pt"
    facts = json.loads(metadata["lora_megatron"])
    assert (facts["base_fingerprint"], facts["seed"], facts["alpha"], facts["rank_stabilised"]) == (
        "f" * 32,
        3,
        16,
        True,
    )
    assert (facts["ranks"]["0.q"], facts["ranks"]["1.q"], "3.v" in facts["ranks"]) == (4, 8, False)
    assert read_manifest(tmp_path / "a")["adapter"] == facts
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["use_rslora"], config["bias"]) == ("LORA", True, "none")


@pytest.mark.parametrize("method", [{"targets": ALL}, PATTERNED], ids=["all", "patterned"])
def test_peft_loads_the_folder(pool: Pool, tmp_path: Path, method: Tree) -> None:
    """PEFT builds exactly these modules from our configuration and takes every tensor from our file."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    folder = tmp_path / "adapter"
    pool.run(4, write_adapter, folder=folder, model=LLAMA, method=method, layout=Layout(2, 2))
    shape = resolve_shape(ModelSection(**LLAMA), tokenizer_vocab_size=100)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_query_groups,
        )
    )
    model = peft.get_peft_model(llama, peft.LoraConfig.from_pretrained(str(folder)))
    ours = load_file(folder / "adapter_model.safetensors")
    answer = peft.set_peft_model_state_dict(model, ours)
    assert answer.unexpected_keys == []
    assert [key for key in answer.missing_keys if "lora_" in key] == []
    theirs = peft.get_peft_model_state_dict(model)
    assert set(theirs) == set(ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    chosen = choose_method(MethodSection(**method), num_layers=4)
    for name, module in model.named_modules():
        if hasattr(module, "scaling") and name.endswith("q_proj"):
            layer = int(name.split("layers.")[1].split(".")[0])
            (adapter,) = chosen.adapters(layer, "q")
            assert module.scaling["default"] == pytest.approx(adapter.scale)


def test_a_failed_replacement_keeps_the_old_adapter(pool: Pool, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    pool.run(2, write_adapter, folder=folder, model=GPT, method={"targets": ALL}, layout=Layout(2))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    errors = pool.run(2, _write_with_full_disk, folder=folder)
    assert errors[0] == errors[1]
    assert "cannot write" in errors[0]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert names_in(tmp_path) == ["adapter"]


def _write_with_full_disk(folder: Path) -> str:
    from tests.faults.file_limit import largest_file

    size = (folder / "adapter_model.safetensors").stat().st_size // 2
    try:
        with largest_file(size):
            write_adapter(folder, GPT, {"targets": ALL}, Layout(2))
    except CheckpointError as error:
        return str(error)
    return "written"

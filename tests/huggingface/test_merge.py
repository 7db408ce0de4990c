# SPDX-License-Identifier: Apache-2.0
"""A merged checkpoint, loaded by plain transformers, is the base plus scale B A, and nothing else of it changed.

The expected deltas are computed here from the adapter's file in fp64 and put into transformers' own modules by
arithmetic of this file's own, so that a wrong row map in `layout` cannot agree with itself.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_megatron.evaluation.greedy import greedy
from lora_megatron.huggingface import merge as merging
from lora_megatron.huggingface.merge import merge
from tests.checkpoint.seal import reseal
from tests.huggingface.adapters import make_adapter
from tests.huggingface.models import LENGTH, MODELS, VOCABULARY, make_model, model_class, save_model, tokens
from tests.pool import Pool
from tests.safetensors_files import same

ALPHA, NEW_TOKENS = 6.0, 6
PROMPTS = tokens(length=LENGTH - NEW_TOKENS)
_KEY = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_B\.weight")
_TENSORS = "adapter_model.safetensors"
FUSED = ("gpt2", "gpt_neox", "llama")  # stacked and transposed, interleaved, apart
Answers = dict[str, tuple[Tensor, list[list[int]]]]


def answers_of(chunks: Any) -> tuple[Tensor, list[list[int]]]:
    """Our own model's logits [b, s, v] of the prompts and how it continues them."""
    where = torch.arange(PROMPTS.shape[1]).expand_as(PROMPTS)
    with torch.no_grad():
        logits = chunks[0](PROMPTS, where, None)[..., :VOCABULARY].clone()
    room = {"length": LENGTH, "new_tokens": NEW_TOKENS, "vocab_size": VOCABULARY}
    return logits, greedy(chunks, PROMPTS.tolist(), eos_id=-1, pad_id=0, **room)


def prepare(folder: Path) -> Answers:
    """For every model NAME: NAME (the base), NAME-lora, NAME-zero, NAME-top; what our models with them answer."""
    answers = {}
    for name in MODELS:
        base = save_model(name, folder / name)
        make_adapter(base, folder / f"{name}-zero", alpha=ALPHA, randomise=False)
        make_adapter(base, folder / f"{name}-same", name="ft_top2", randomise=False)
        answers[name] = answers_of(make_adapter(base, folder / f"{name}-lora", alpha=ALPHA))
        answers[f"{name}-top"] = answers_of(make_adapter(base, folder / f"{name}-top", name="ft_top2"))
    answers["opt-bits"] = answers_of(make_adapter(folder / "opt", folder / "opt-bits", name="bitfit"))
    layers = {"1": {"o": 3, "q": 0}}
    chunks = make_adapter(folder / "qwen3", folder / "qwen3-rs", scaling="rslora", targets={"q": 4}, layers=layers)
    answers["qwen3-rs"] = answers_of(chunks)
    for name in FUSED:
        make_model(name).to(torch.bfloat16).save_pretrained(folder / f"{name}-bf16", max_shard_size="20KB")
        make_adapter(folder / f"{name}-bf16", folder / f"{name}-bf16-lora", alpha=ALPHA, precision="bf16")
    return answers


@pytest.fixture(scope="module")
def prepared(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answers]:
    """The folder of `prepare`, read only, and its answers."""
    folder = tmp_path_factory.mktemp("merge")
    return folder, pool.run(1, prepare, folder=folder)[0]


@pytest.fixture(scope="module")
def models(prepared: tuple[Path, Answers]) -> Path:
    return prepared[0]


def weight_of(model: Any, layer: int, projection: str) -> Tensor:
    """A view of a projection's weight in a transformers model: [out, in], or [heads, out of a head, in]."""
    kind, word = model.config.model_type, projection.removesuffix("_proj")
    if kind == "gpt2":
        block = model.transformer.h[layer]
        if word in ("q", "k", "v"):
            return block.attn.c_attn.weight.data.T.chunk(3)["qkv".index(word)]
        return {"o": block.attn.c_proj, "fc1": block.mlp.c_fc, "fc2": block.mlp.c_proj}[word].weight.data.T
    if kind == "gpt_neox":
        block = model.gpt_neox.layers[layer]
        if word in ("q", "k", "v"):
            fused = block.attention.query_key_value.weight.data
            return fused.view(model.config.num_attention_heads, 3, -1, fused.shape[1])[:, "qkv".index(word)]
        names = {"o": block.attention.dense, "fc1": block.mlp.dense_h_to_4h, "fc2": block.mlp.dense_4h_to_h}
        return names[word].weight.data
    if kind == "opt":
        block = model.model.decoder.layers[layer]
        names = {"o": block.self_attn.out_proj, "fc1": block.fc1, "fc2": block.fc2}
        return (names[word] if word in names else getattr(block.self_attn, projection)).weight.data
    block = model.model.layers[layer]
    return getattr(block.mlp if word in ("gate", "up", "down") else block.self_attn, projection).weight.data


def pairs_of(adapter: Path) -> list[tuple[int, str, Tensor, Tensor]]:
    """(layer, projection, A, B) of an adapter, read with the official library."""
    stored = load_file(adapter / _TENSORS)
    found = [(match, key) for key in stored if (match := _KEY.fullmatch(key))]
    assert 2 * len(found) == len(stored)
    return [(int(m[1]), m[2], stored[key.replace("lora_B", "lora_A")], stored[key]) for m, key in found]


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(PROMPTS).logits


def load(name: str, folder: Path) -> Any:
    """A merged folder as plain transformers loads it; every weight must come from it."""
    model, info = model_class(name).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def continuation(model: Any) -> list[list[int]]:
    """Greedy tokens by transformers' own `generate`."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    out = model.generate(PROMPTS, attention_mask=torch.ones_like(PROMPTS), max_new_tokens=NEW_TOKENS)
    return out[:, PROMPTS.shape[1] :].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_merged_is_the_base_plus_the_deltas(prepared: tuple[Path, Answers], tmp_path: Path, name: str) -> None:
    folder, answers = prepared
    result = merge(folder / name, folder / f"{name}-lora", tmp_path / "out")
    merged = load(name, tmp_path / "out")
    expected = make_model(name).double()
    before = logits_of(expected)
    pairs = pairs_of(folder / f"{name}-lora")
    assert len(pairs) == 4 * (7 if expected.config.model_type in ("llama", "mistral", "qwen2", "qwen3") else 6)
    largest = 0.0
    for layer, projection, a, b in pairs:
        weight, delta = weight_of(expected, layer, projection), ALPHA / a.shape[0] * (b.double() @ a.double())
        largest = max(largest, float(delta.norm() / weight.norm()))
        weight += delta.view_as(weight)
    after = logits_of(expected)
    assert float((after - before).abs().max()) > 0.1  # the adapter does something
    assert float((logits_of(merged) - after).abs().max()) < 2e-5  # fp32 against fp64 over four layers
    assert result.largest == pytest.approx(largest, rel=1e-5)
    ours, chosen = answers[name]
    assert float((logits_of(merged) - ours).abs().max()) < 1e-4
    assert continuation(merged) == chosen


@pytest.mark.parametrize("name", [*(f"{name}-top" for name in MODELS), "opt-bits", "qwen3-rs"])
def test_merged_answers_as_our_model_with_the_adapter(
    prepared: tuple[Path, Answers], tmp_path: Path, name: str
) -> None:
    folder, answers = prepared
    base = name.rpartition("-")[0]
    merge(folder / base, folder / name, tmp_path / "out")
    merged = load(base, tmp_path / "out")
    ours, chosen = answers[name]
    assert float((logits_of(make_model(base)) - ours).abs().max()) > 0.05
    assert float((logits_of(merged) - ours).abs().max()) < 1e-4
    assert continuation(merged) == chosen


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["zero", "same"])
@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_that_changes_nothing_gives_back_the_same_bytes(
    models: Path, tmp_path: Path, name: str, kind: str
) -> None:
    merge(models / name, models / f"{name}-{kind}", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(models / name)
    base = tmp_path / "signed"  # the same model with zeros of both signs
    model = make_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.reshape(-1)[::3] = -0.0
            parameter.reshape(-1)[1::3] = 0.0
    model.save_pretrained(base, max_shard_size="20KB")
    if kind == "zero":
        merge(base, models / f"{name}-{kind}", tmp_path / "out-signed", any_base=True)
        assert contents(tmp_path / "out-signed") == contents(base)


def dyadic(adapter: Path) -> None:
    """Give an adapter factors whose products and sums are exact in fp32, in any order."""
    stored = load_file(adapter / _TENSORS)
    generator = torch.Generator().manual_seed(2)
    for key, value in stored.items():
        stored[key] = (torch.randint(-15, 16, value.shape, generator=generator) / 128).to(value.dtype)
    save_file(stored, adapter / _TENSORS, {"format": "pt"})
    reseal(adapter)


@pytest.mark.parametrize("name", FUSED)
def test_bf16_is_rounded_once_from_an_fp32_sum(
    models: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = models / f"{name}-bf16", models / f"{name}-bf16-lora"
    dyadic(adapter)
    merge(base, adapter, tmp_path / "out")
    expected = make_model(name).to(torch.bfloat16)
    rounded_twice = 0
    for layer, projection, a, b in pairs_of(adapter):
        weight = weight_of(expected, layer, projection)
        delta = ((b.double() @ a.double()).float() * (ALPHA / a.shape[0])).view_as(weight)
        once = (weight.float() + delta).to(torch.bfloat16)
        rounded_twice += int((once != weight + delta.to(torch.bfloat16)).sum())
        weight.copy_(once)
    assert rounded_twice > 100  # the other way is another result
    expected.save_pretrained(tmp_path / "expected", max_shard_size="20KB")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    monkeypatch.setattr(merging, "_BLOCK_ELEMENTS", 3 * 32)  # blocks of a few rows, the last of them shorter
    merge(base, adapter, tmp_path / "blocks")
    assert contents(tmp_path / "blocks") == contents(tmp_path / "out")


def test_shards_keep_their_names_headers_and_whatever_has_no_adapter(models: Path, pool: Pool, tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base", max_shard_size="20KB")
    pool.run(1, _one_layer, base=base, out=tmp_path / "adapter")
    assert merge(base, tmp_path / "adapter", tmp_path / "out").changed == 1
    before, after = contents(base), contents(tmp_path / "out")
    assert set(before) == set(after)
    where = json.loads(before["model.safetensors.index.json"])["weight_map"]
    changed = "model.layers.2.self_attn.v_proj.weight"
    assert [name for name in sorted(before) if before[name] != after[name]] == [where[changed]]
    size = 8 + int.from_bytes(before[where[changed]][:8], "little")
    assert before[where[changed]][:size] == after[where[changed]][:size]
    old, new = load_file(base / where[changed]), load_file(tmp_path / "out" / where[changed])
    assert [name for name in old if not same(old[name], new[name])] == [changed]


def _one_layer(base: Path, out: Path) -> None:
    make_adapter(base, out, targets={}, layers={"2": {"v": 2}})


def test_a_bare_backbone_and_a_stored_tied_head(models: Path, tmp_path: Path) -> None:
    """Files without the beginning of names; a head that is a second copy of the embedding stays one."""
    bare, tied = tmp_path / "bare", tmp_path / "tied"
    make_model("gpt2").transformer.save_pretrained(bare)
    merge(bare, models / "gpt2-lora", tmp_path / "out-bare")
    merge(models / "gpt2", models / "gpt2-lora", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for key, value in load_file(tmp_path / "out-bare" / "model.safetensors").items():
        assert same(value, merged[f"transformer.{key}"])
    tied.mkdir()
    stored = load_file(models / "qwen2" / "model.safetensors")
    embedding = stored["model.embed_tokens.weight"]
    save_file({**stored, "lm_head.weight": embedding.clone()}, tied / "model.safetensors", {"format": "pt"})
    (tied / "config.json").write_bytes((models / "qwen2" / "config.json").read_bytes())
    merge(tied, models / "qwen2-lora", tmp_path / "out-tied")
    merged = load_file(tmp_path / "out-tied" / "model.safetensors")
    assert same(merged["lm_head.weight"], embedding)
    assert same(merged["model.embed_tokens.weight"], embedding)

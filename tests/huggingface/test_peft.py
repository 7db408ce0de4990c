# SPDX-License-Identifier: Apache-2.0
"""Adapters to PEFT and back, judged by PEFT itself on transformers' models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_megatron.checkpoint.adapter_reader import AdapterReader
from lora_megatron.errors import CheckpointError, ConfigError
from lora_megatron.huggingface.checkpoint import HfCheckpoint
from lora_megatron.huggingface.peft_export import export_adapter
from lora_megatron.huggingface.peft_import import import_adapter
from lora_megatron.parallel.groups import Layout
from tests.huggingface.adapters import make_adapter
from tests.huggingface.logits import logits_of
from tests.huggingface.models import FAMILIES, model_class, tokens
from tests.pool import Pool

Saved = Callable[[str], Path]
FUSED = ("gpt2", "gpt_neox")


def sharded_adapter(
    base: Path, out: Path, layout: Layout, targets: dict[str, int] | None, method: dict[str, Any]
) -> Any:
    """On every rank: an adapter saved from this layout, and the model's logits with it (rank 0's counts)."""
    chunks = make_adapter(base, out, layout=layout, targets=targets, **method)
    return logits_of(chunks, tokens())


def peft_logits(base: Path, name: str, adapter: Path) -> Tensor:
    """What PEFT makes of the adapter on transformers' model."""
    import peft

    model = model_class(name).from_pretrained(base, attn_implementation="eager")
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, adapter).eval()(tokens()).logits


def base_logits(base: Path, name: str) -> Tensor:
    with torch.no_grad():
        return model_class(name).from_pretrained(base, attn_implementation="eager")(tokens()).logits


CASES: dict[str, tuple[dict[str, int] | None, dict[str, Any]]] = {
    "all": (None, {}),
    "q-v": ({"q": 4, "v": 4}, {}),
    "rslora": ({"q": 4, "v": 4, "fc2": 2}, {"scaling": "rslora"}),
    "some-layers": ({"v": 2}, {"layers": {"1-2": {"v": 0, "fc1": 3}}}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_tp2_pp2_trained_peft_loads(pool: Pool, saved: Saved, tmp_path: Path, name: str, case: str) -> None:
    targets, method = CASES[case]
    layout = Layout(tensor=2, pipeline=2)
    adapter, out = tmp_path / "adapter", tmp_path / "peft"
    ours = pool.run(4, sharded_adapter, base=saved(name), out=adapter, layout=layout, targets=targets, method=method)[0]
    export_adapter(saved(name), adapter, out)
    theirs = peft_logits(saved(name), name, out)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (theirs - base_logits(saved(name), name)).abs().max() > 0.1, "the adapter must say something"
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]

    back = tmp_path / "back"
    import_adapter(saved(name), out, back)
    with HfCheckpoint(saved(name)) as checkpoint:
        shape, fingerprint = checkpoint.shape, checkpoint.fingerprint()
    with (
        AdapterReader(adapter, shape, base_fingerprint=fingerprint) as first,
        AdapterReader(back, shape, base_fingerprint=fingerprint) as second,
    ):
        assert list(first.adapted()) == list(second.adapted())
        for place in first.adapted():
            (a, b), (c, d) = first.pair(*place), second.pair(*place)
            assert torch.equal(a, c)
            torch.testing.assert_close(b * first.scale(*place), d * second.scale(*place), rtol=1e-6, atol=0)


def loaded_logits(base: Path, adapter: Path, layout: Layout) -> Tensor:
    """On every rank: the logits of the sharded model with an adapter folder loaded into it."""
    from lora_megatron.checkpoint.adapter import load_adapter
    from lora_megatron.huggingface.base import describe_hf_base
    from lora_megatron.model.build import BuildOptions, build
    from lora_megatron.parallel.groups import build_mesh

    build_mesh(layout, seed=1)
    described = describe_hf_base(base)
    with AdapterReader(adapter, described.shape) as reader:
        method = reader.method
    assert method is not None
    chunks = build(described.shape, method, layout, BuildOptions())
    described.load(chunks)
    load_adapter(adapter, chunks, method, described.shape, base_fingerprint=described.fingerprint)
    return logits_of(chunks, tokens())


def peft_adapter(base: Path, name: str, out: Path, **config: Any) -> Tensor:
    """An adapter PEFT made, every factor random, saved by PEFT; the logits with it."""
    import peft

    model = model_class(name).from_pretrained(base, attn_implementation="eager")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        logits: Tensor = adapted(tokens()).logits
    adapted.save_pretrained(out)
    return logits


ATTENTION = {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"]}


@pytest.mark.parametrize("targets", ["attention", "all-linear"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_peft_trained_a_sharded_model_loads(
    pool: Pool, saved: Saved, tmp_path: Path, name: str, targets: str
) -> None:
    modules: Any = targets if targets == "all-linear" else ATTENTION.get(name, ["q_proj", "v_proj"])
    config = {"r": 4, "lora_alpha": 6, "target_modules": modules, "use_rslora": targets == "all-linear"}
    theirs = peft_adapter(saved(name), name, tmp_path / "peft", **config)
    import_adapter(saved(name), tmp_path / "peft", tmp_path / "adapter")
    for world, layout in ((1, Layout()), (4, Layout(tensor=2, pipeline=2, sequence=True))):
        ours = pool.run(world, loaded_logits, base=saved(name), adapter=tmp_path / "adapter", layout=layout)[0]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

    export_adapter(saved(name), tmp_path / "adapter", tmp_path / "again")
    first, again = (load_file(tmp_path / where / "adapter_model.safetensors") for where in ("peft", "again"))
    assert {key: value.shape for key, value in first.items()} == {key: value.shape for key, value in again.items()}
    torch.testing.assert_close(peft_logits(saved(name), name, tmp_path / "again"), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_patterns_of_rank_and_alpha(pool: Pool, saved: Saved, tmp_path: Path, name: str) -> None:
    first = "transformer.h.1.attn.c_attn" if name == "gpt2" else "model.layers.1.self_attn.v_proj"
    config = {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION.get(name, ["q_proj", "v_proj"])}
    patterns = {"rank_pattern": {first: 2}, "alpha_pattern": {first: 5, f"^{first.replace('.1.', '.2.')}": 7}}
    theirs = peft_adapter(saved(name), name, tmp_path / "peft", **config, **patterns)
    import_adapter(saved(name), tmp_path / "peft", tmp_path / "adapter")
    ours = pool.run(1, loaded_logits, base=saved(name), adapter=tmp_path / "adapter", layout=Layout())[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_gate_alone_is_an_adapter(pool: Pool, saved: Saved, tmp_path: Path) -> None:
    config = {"r": 2, "lora_alpha": 3, "target_modules": ["gate_proj"], "layers_to_transform": [0, 3]}
    theirs = peft_adapter(saved("llama"), "llama", tmp_path / "peft", **config)
    facts = import_adapter(saved("llama"), tmp_path / "peft", tmp_path / "adapter")
    assert facts["ranks"] == {"0.gate": 2, "3.gate": 2}
    ours = pool.run(2, loaded_logits, base=saved("llama"), adapter=tmp_path / "adapter", layout=Layout(tensor=2))[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def plain(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT adapter of q and v of the Llama; copy it before changing it."""
    folder = tmp_path_factory.mktemp("peft") / "plain"
    peft_adapter(saved("llama"), "llama", folder, r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    return folder


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def change_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def change_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return apply


def only_a_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "dora": (change_config(use_dora=True), "use_dora = True is not supported"),
    "modules to save": (change_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "bias": (change_config(bias="all"), "bias = 'all'"),
    "not lora": (change_config(peft_type="IA3"), "peft_type 'IA3'"),
    "rank 8 of 4": (change_config(r=8), r"has shape \[4, 32\].* call for \[8, 32\]"),
    "rank 0": (change_config(r=0), "is 0; it must be a whole number above 0"),
    "alpha NaN": (lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": NaN}'), "NaN"),
    "alpha of 400 digits": (change_config(lora_alpha=10**400), "the alpha of"),
    "alpha of nothing": (change_config(lora_alpha=1e-320), "the alpha of"),
    "pissa": (change_config(init_lora_weights="pissa"), "'pissa' changes the base's weights too"),
    "alpha text": (change_config(lora_alpha="many"), "'many'"),
    "a regular expression": (change_config(rank_pattern={"(a+)+$": 3}), "only plain module names"),
    "missing v_proj": (
        change_tensors(lambda t: [t.pop(k) for k in list(t) if "layers.2.self_attn.v_proj" in k]),
        "layers.2.self_attn.v_proj is a target and has no tensors",
    ),
    "no target": (change_config(target_modules=["q_proj"]), "has tensors in the adapter and is no target"),
    "half a pair": (change_tensors(lambda t: t.pop(FIRST)), "has lora_B and not the other factor"),
    "another model": (
        change_tensors(lambda t: t.update({FIRST.replace("layers.0", "layers.9"): t.pop(FIRST)})),
        "which is no linear layer of a llama",
    ),
    "an embedding": (
        change_tensors(lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": t.pop(FIRST)})),
        "is not a LoRA factor of a linear layer",
    ),
    "not a number": (change_tensors(lambda t: t[FIRST].fill_(float("nan"))), "not finite"),
    "integers": (change_tensors(lambda t: t.update({FIRST: t[FIRST].int()})), "not finite numbers"),
    "a pickle": (only_a_pickle, "pickle files can run code and are never read"),
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), r"cannot read .*adapter_config\.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_peft_would_take_in_silence_is_refused(saved: Saved, plain: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "peft"
    shutil.copytree(plain, folder)
    DAMAGE[damage][0](folder)
    with pytest.raises(CheckpointError, match=DAMAGE[damage][1]) as caught:
        import_adapter(saved("llama"), folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".tmp-*"))


def test_another_base_and_a_full_folder_are_refused(saved: Saved, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no linear layer of a gpt2"):
        import_adapter(saved("gpt2"), plain, tmp_path / "out")
    import_adapter(saved("llama"), plain, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="exists already"):
        import_adapter(saved("llama"), plain, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="was trained on another base"):
        export_adapter(saved("qwen2"), tmp_path / "adapter", tmp_path / "out")
    export_adapter(saved("qwen2"), tmp_path / "adapter", tmp_path / "out", any_base=True)

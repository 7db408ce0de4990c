# SPDX-License-Identifier: Apache-2.0
"""Configurations and folders that are old, odd, damaged or hostile: read as what they are, or refused in one line."""

from __future__ import annotations

import json
import math
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
from lora_megatron.huggingface.configuration import read_configuration
from lora_megatron.huggingface.families import FAMILIES
from lora_megatron.model.shape import ModelShape

Saved = Callable[[str], Path]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 99,
}


def shape_of(folder: Path, values: dict[str, Any]) -> ModelShape:
    (folder / "config.json").write_text(json.dumps(values))
    return read_configuration(folder)[1]


def test_defaults_are_those_of_the_published_classes(tmp_path: Path) -> None:
    """A configuration of sizes alone means what transformers makes of it."""
    import transformers

    shape = shape_of(tmp_path, LLAMA)
    theirs = transformers.LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"})
    assert (shape.num_query_groups, shape.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)
    assert (shape.norm_epsilon, shape.max_position_embeddings) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert shape.tied_embeddings is theirs.tie_word_embeddings is False
    gpt2 = shape_of(tmp_path, {"model_type": "gpt2"})
    reference = transformers.GPT2Config()
    assert (gpt2.num_layers, gpt2.hidden_size, gpt2.vocab_size) == (reference.n_layer, reference.n_embd, 50257)
    assert (gpt2.ffn_hidden_size, gpt2.tied_embeddings, gpt2.activation) == (3072, True, "gelu_tanh")


def test_old_spellings_of_rotary_parameters(tmp_path: Path) -> None:
    """`rope_theta` and `rope_scaling` with `type`, before `rope_parameters`; GPT-NeoX has names of its own."""
    old = shape_of(tmp_path, {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}})
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    assert old == shape_of(tmp_path, {**LLAMA, "rope_parameters": new})
    assert (old.rotary_base, old.rope_scaling) == (5e5, {"rope_type": "linear", "factor": 2.0})
    neox = {**LLAMA, "model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 20000}
    assert shape_of(tmp_path, neox).rotary_percent == 0.5
    assert shape_of(tmp_path, neox).rotary_base == 20000
    yarn = {"rope_type": "yarn", "factor": 4.0}  # the original length is then the stated one
    assert shape_of(tmp_path, {**LLAMA, "rope_scaling": yarn}).rope_scaling["original_max_position_embeddings"] == 2048


def test_windows(tmp_path: Path) -> None:
    mistral, qwen2 = {**LLAMA, "model_type": "mistral"}, {**LLAMA, "model_type": "qwen2"}
    assert shape_of(tmp_path, {**mistral, "sliding_window": None}).sliding_window == 0
    assert shape_of(tmp_path, {**mistral, "sliding_window": 9}).sliding_window == 9
    assert shape_of(tmp_path, {**qwen2, "sliding_window": 9}).sliding_window == 0
    mixed = shape_of(tmp_path, {**qwen2, "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 3})
    assert [mixed.window(layer) for layer in range(4)] == [0, 0, 0, 9]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a family of no kind": ({"model_type": "bert"}, f"'bert' is not supported; supported are {', '.join(FAMILIES)}"),
    "no family": ({"model_type": None}, "model_type None is not supported"),
    "a list for a family": ({"model_type": ["llama"]}, "is not supported"),
    "quantised": ({"quantization_config": {"bits": 4}}, "the weights are quantised"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers = 0 must be a whole number above 0"),
    "half a layer": ({"num_hidden_layers": 2.5}, "num_hidden_layers = 2.5 must be a whole number above 0"),
    "true layers": ({"num_hidden_layers": True}, "num_hidden_layers = True must be a whole number"),
    "no vocabulary": ({"vocab_size": None}, "vocab_size is missing"),
    "heads that do not divide": ({"num_attention_heads": 5}, "32 hidden dimensions do not divide into 5 heads"),
    "groups that do not divide": ({"num_key_value_heads": 3}, "is not a multiple of"),
    "an odd head": ({"head_dim": 7}, "must be an even number"),
    "an unknown activation": ({"hidden_act": "snake"}, "the activation 'snake' is not supported; supported are gelu"),
    "longrope": ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "'longrope' is not supported"),
    "scaling as text": ({"rope_scaling": "linear"}, "must be an object"),
    "a factor of nothing": ({"rope_scaling": {"rope_type": "linear"}}, "needs factor > 0"),
    "post-norm OPT": (
        {"model_type": "opt", "do_layer_norm_before": False},
        "do_layer_norm_before = False is a variant",
    ),
    "projected OPT": ({"model_type": "opt", "word_embed_proj_dim": 16}, "word_embed_proj_dim = 16 is a variant"),
    "scaled GPT-2": (
        {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx = True is a variant of gpt2 that is not supported, only False",
    ),
    "a window of text": ({"model_type": "mistral", "sliding_window": "9"}, "sliding_window = '9' must be"),
    "layers in another order": (
        {
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "layer_types mixes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_computed_is_refused_by_name(tmp_path: Path, case: str) -> None:
    changes, says = REFUSED[case]
    with pytest.raises(CheckpointError) as caught:
        shape_of(tmp_path, {**LLAMA, **changes})
    assert says in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


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


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=4),
    st.sampled_from(["linear", "yarn", "llama3", "silu", "gelu"]),
    st.lists(st.integers(0, 4), max_size=3),
    st.dictionaries(
        st.sampled_from(["rope_type", "type", "factor", "rope_theta", "beta_fast", "x"]), st.integers(-1, 9), max_size=3
    ),
)
KEYS = sorted(
    {key for family in FAMILIES.values() for key, _ in family.sizes.values()}
    | {key for family in FAMILIES.values() for key in family.demands}
    | {"rope_scaling", "rope_parameters", "rope_theta", "sliding_window", "use_sliding_window", "max_window_layers"}
    | {"rotary_pct", "layer_types", "quantization_config"}
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(FAMILIES)), st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5))
def test_any_configuration_is_read_or_refused(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    try:
        shape = shape_of(tmp_path, {**LLAMA, "ffn_dim": 64, "model_type": family, **changes})
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either outcome is right, and this one must be a line
        return
    assert shape.num_layers >= 1
    assert shape.rotary_dim % 2 == 0 or shape.position == "learned"
    assert math.isfinite(shape.norm_epsilon)
    assert ModelShape.from_dict(shape.to_dict(), source="itself") == shape


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.sampled_from(["config.json", "model.safetensors.index.json"]))
def test_any_bytes_are_refused(saved: Saved, tmp_path: Path, content: bytes, name: str) -> None:
    folder = tmp_path / "fuzzed"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((saved("gpt2") / "config.json").read_bytes())
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError):
        HfCheckpoint(folder)

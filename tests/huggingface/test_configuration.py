# SPDX-License-Identifier: Apache-2.0
"""Configurations old and odd: read as what transformers makes of them, or refused by name in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_megatron.errors import CheckpointError
from lora_megatron.huggingface.configuration import read_configuration
from lora_megatron.huggingface.families import FAMILIES
from lora_megatron.layers.rope import attention_factor, inverse_frequencies
from lora_megatron.model.shape import ModelShape

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
    original = "original_max_position_embeddings"
    yarn = {"rope_type": "yarn", "factor": 4.0}  # the original length is then the one beside it, or the stated one
    assert shape_of(tmp_path, {**LLAMA, "rope_scaling": yarn}).rope_scaling[original] == 2048
    assert shape_of(tmp_path, {**LLAMA, "rope_scaling": yarn, original: 512}).rope_scaling[original] == 512
    derived = shape_of(tmp_path, {**LLAMA, "rope_scaling": {"type": "yarn", original: 256, "mscale": None, "x": 1}})
    assert derived.rope_scaling == {"rope_type": "yarn", "factor": 8.0, original: 256}


def test_windows(tmp_path: Path) -> None:
    mistral, qwen2 = ({**LLAMA, "num_key_value_heads": 2, "model_type": name} for name in ("mistral", "qwen2"))
    assert shape_of(tmp_path, mistral).sliding_window == 4096, "the class's own where the key is absent"
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
    "a type of no kind": ({"rope_scaling": {"rope_type": []}}, "rope_type [] is not supported"),
    "an original length of 0": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 0}},
        "original_max_position_embeddings = 0 must be",
    ),
    "an original length of text": (
        {"rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": "8192"}},
        "original_max_position_embeddings = '8192' must be",
    ),
    "truncate by word": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": "no"}},
        "truncate true or false, not 'no'",
    ),
    "a base of one": ({"rope_theta": 1}, "rotary_base = 1.0 must be above 1"),
    "more than a head": ({"partial_rotary_factor": 2.0}, "rotary_percent = 2.0"),
    "a million layers": ({"num_hidden_layers": 10**6}, "no model has more than 10000"),
    "a switch by word": (
        {"model_type": "qwen2", "use_sliding_window": "false", "sliding_window": 4},
        "use_sliding_window = 'false' must be true or false",
    ),
    "post-norm OPT": (
        {"model_type": "opt", "do_layer_norm_before": False},
        "do_layer_norm_before = False is a variant",
    ),
    "projected OPT": ({"model_type": "opt", "word_embed_proj_dim": 16}, "word_embed_proj_dim = 16 is a variant"),
    "scaled GPT-2": (
        {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx = True is a variant of gpt2 that is not supported, only False",
    ),
    "a window of text": (
        {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": "9"},
        "sliding_window = '9' must be",
    ),
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
    if shape.position == "rope" and shape.head_dim < 2**16:
        frequencies = inverse_frequencies(shape.rotary_dim, base=shape.rotary_base, scaling=shape.rope_scaling)
        assert bool(torch.isfinite(frequencies).all())
        assert math.isfinite(attention_factor(shape.rope_scaling))
    assert ModelShape.from_dict(shape.to_dict(), source="itself") == shape

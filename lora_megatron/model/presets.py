# SPDX-License-Identifier: Apache-2.0
"""Named shapes: a table, and the rule that turns the configuration's model section into a shape.

GPT-2 and GPT-3 sizes are those of their papers (GPT-3: table 2.1; its XL row gives 24 heads of 128 for a width of
2048, which does not add up, so 16 heads are used, and 13B's width of 5140 is taken as 5120 = 40 x 128).
"""

from __future__ import annotations

import difflib
from typing import Any

from lora_megatron.config import ModelSection
from lora_megatron.errors import ConfigError
from lora_megatron.model.shape import ModelShape


def _gpt(layers: int, hidden: int, heads: int, positions: int) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "max_position_embeddings": positions,
    }


_LLAMA = {
    "normalization": "RMSNorm",
    "activation": "silu",
    "gated_mlp": True,
    "linear_bias": False,
    "position": "rope",
    "tied_embeddings": False,
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _gpt(2, 64, 4, 256),
    "tiny-llama": {**_gpt(2, 64, 4, 256), "num_query_groups": 2, "ffn_hidden_size": 176, **_LLAMA},
    "mini": _gpt(4, 128, 4, 256),
    "gpt2-small": _gpt(12, 768, 12, 1024),
    "gpt2-medium": _gpt(24, 1024, 16, 1024),
    "gpt2-large": _gpt(36, 1280, 20, 1024),
    "gpt2-xl": _gpt(48, 1600, 25, 1024),
    "gpt3-125m": _gpt(12, 768, 12, 2048),
    "gpt3-350m": _gpt(24, 1024, 16, 2048),
    "gpt3-760m": _gpt(24, 1536, 16, 2048),
    "gpt3-1.3b": _gpt(24, 2048, 16, 2048),
    "gpt3-2.7b": _gpt(32, 2560, 32, 2048),
    "gpt3-6.7b": _gpt(32, 4096, 32, 2048),
    "gpt3-13b": _gpt(40, 5120, 40, 2048),
    "gpt3-175b": _gpt(96, 12288, 96, 2048),
    "llama2-70b": {
        **_gpt(80, 8192, 64, 4096),
        "num_query_groups": 8,
        "ffn_hidden_size": 28672,
        **_LLAMA,
    },
}

_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")


def resolve_shape(section: ModelSection, *, tokenizer_vocab_size: int) -> ModelShape:
    """Preset < fields of the section; heads, groups, MLP width and vocabulary follow where they are not given.

    Raises:
        ConfigError: unknown preset, missing sizes, or a vocabulary smaller than the tokenizer's.
    """
    values: dict[str, Any] = {}
    if section.preset is not None:
        if section.preset not in PRESETS:
            nearest = difflib.get_close_matches(section.preset, PRESETS, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"unknown model.preset {section.preset!r}: did you mean {nearest}? (valid: {', '.join(PRESETS)})"
            )
        values.update(PRESETS[section.preset])
    values.update(section.model_dump(exclude={"preset"}, exclude_none=True))
    missing = [name for name in _REQUIRED if name not in values]
    if missing:
        raise ConfigError(f"model.{missing[0]} is not given: name a model.preset or give {', '.join(missing)}")
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if "head_dim" not in values and hidden % heads:
        raise ConfigError(f"model.hidden_size = {hidden} is not a multiple of model.num_attention_heads = {heads}")
    values.setdefault("head_dim", hidden // heads)
    values.setdefault("num_query_groups", heads)
    values.setdefault("ffn_hidden_size", 4 * hidden)
    values.setdefault("vocab_size", tokenizer_vocab_size)
    for name in ("qkv_bias", "proj_bias"):
        values.setdefault(name, values.get("linear_bias", True))
    if values["vocab_size"] < tokenizer_vocab_size:
        raise ConfigError(
            f"model.vocab_size = {values['vocab_size']} is smaller than the tokenizer's {tokenizer_vocab_size}"
        )
    return ModelShape(**values)

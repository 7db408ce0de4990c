# SPDX-License-Identifier: Apache-2.0
"""Tiny randomly initialised transformers models of every family, saved as their users hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 99  # not a multiple of anything, so that padding shows
LENGTH = 16
_SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": VOCABULARY}
_GATED = {**_SIZES, "intermediate_size": 56, "num_key_value_heads": 2, "max_position_embeddings": 64}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Name -> (class of transformers, its configuration). Several variants of a family where its flags matter.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}),
    "opt": ("OPT", {**_SIZES, "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32}),
    "gpt_neox": ("GPTNeoX", {**_SIZES, "intermediate_size": 64, "rotary_pct": 0.5, "max_position_embeddings": 64}),
    "llama": ("Llama", _GATED),
    "mistral": ("Mistral", {**_GATED, "sliding_window": 5, "head_dim": 16}),
    "qwen2": ("Qwen2", {**_GATED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**_GATED, "head_dim": 16}),
    "gpt_neox-serial": (
        "GPTNeoX",
        {**_SIZES, "intermediate_size": 64, "use_parallel_residual": False, "max_position_embeddings": 64},
    ),
    "opt-untied": (
        "OPT",
        {
            **_SIZES,
            "ffn_dim": 64,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
            "tie_word_embeddings": False,
        },
    ),
    "llama3": ("Llama", {**_GATED, "rope_parameters": {"rope_theta": 5e5, **_LLAMA3}, "attention_bias": True}),
    "llama-linear": ("Llama", {**_GATED, "rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}}),
    "qwen2-yarn": (
        "Qwen2",
        {
            **_GATED,
            "rope_parameters": {
                "rope_theta": 1e4,
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "qwen2-window": ("Qwen2", {**_GATED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
}
FAMILIES = ("gpt2", "opt", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")


def model_class(name: str) -> Any:
    """transformers' class of a model."""
    import transformers

    family = MODELS[name][0]
    return getattr(transformers, f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")


def make_model(name: str, **changes: Any) -> Any:
    """A transformers causal LM in fp32; every parameter random, also those that start as ones and zeros.

    changes: to its configuration.
    """
    import transformers

    family, values = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**values, **changes})
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout", "hidden_dropout"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    config._attn_implementation = "eager"
    model = model_class(name)(config).float()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 and parameter[0] == 1 else 0.15 * noise)
    return model.eval()


def save_model(name: str, folder: Path, *, max_shard_size: str = "5GB") -> Path:
    """The model as a checkpoint folder; a small `max_shard_size` makes several files and an index."""
    make_model(name).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 5) -> torch.Tensor:
    """Random token ids [batch, length]."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))

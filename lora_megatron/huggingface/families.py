# SPDX-License-Identifier: Apache-2.0
"""The supported model families: a table of names and flags, and nothing that runs.

A family says what its `config.json` calls each size, what it demands of switches this stack has no equivalent for, and
what its tensors are called. `Default` values are those of the published configuration classes, for keys that a
checkpoint leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

REQUIRED = object()
"""No default: a configuration must say it."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type`."""

    model_type: str
    sizes: Mapping[str, tuple[str, Any]]
    """Field of ModelShape -> (key of config.json, value where the key is absent or null)."""
    fixed: Mapping[str, Any]
    """Fields of ModelShape that are the family's own."""
    demands: Mapping[str, Any] = field(default_factory=dict)
    """Switches of config.json that change the function, and the one value that is supported (also the default)."""
    window: str = ""
    """`always`: sliding_window counts; `switch`: only with use_sliding_window, from max_window_layers on."""
    rope_keys: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    """rotary_base and rotary_percent outside `rope_parameters`, as older configurations have them."""

    backbone: str
    """What tensor names begin with; a checkpoint of the bare backbone leaves it out."""
    layer: str
    """What names of layer {i} begin with, after the backbone's."""
    modules: Mapping[str, str]
    """Projections and norms of a layer -> module, after the layer's beginning."""
    embedding: str
    positions: str = ""
    final_norm: str
    head: str
    """The output layer, without the backbone's beginning."""
    fused_qkv: str = ""
    """`stacked`: q, k and v in one matrix, one after the other; `interleaved`: head by head."""
    transposed: bool = False
    """Linear weights are kept [in, out] (GPT-2's Conv1D)."""
    unused_positions: int = 0
    """Rows of the position table before the one of position 0."""
    buffers: tuple[str, ...] = ()
    """Patterns of tensors that hold no weights."""


_LLAMA_MODULES = {
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "fc2": "mlp.down_proj",
}
_LLAMA_NAMES: dict[str, Any] = {
    "backbone": "model.",
    "layer": "layers.{i}.",
    "modules": _LLAMA_MODULES,
    "embedding": "embed_tokens.weight",
    "final_norm": "norm",
    "head": "lm_head.weight",
    "buffers": (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    "rope_keys": {"rotary_base": ("rope_theta", 10000.0), "rotary_percent": ("partial_rotary_factor", 1.0)},
}
_SIZES = {
    "num_layers": ("num_hidden_layers", REQUIRED),
    "hidden_size": ("hidden_size", REQUIRED),
    "num_attention_heads": ("num_attention_heads", REQUIRED),
    "vocab_size": ("vocab_size", REQUIRED),
    "max_position_embeddings": ("max_position_embeddings", 2048),
}
_LLAMA_SIZES = {
    **_SIZES,
    "num_query_groups": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "ffn_hidden_size": ("intermediate_size", REQUIRED),
    "norm_epsilon": ("rms_norm_eps", 1e-6),
    "activation": ("hidden_act", "silu"),
    "tied_embeddings": ("tie_word_embeddings", False),
}
_LLAMA_FIXED = {"normalization": "RMSNorm", "gated_mlp": True, "position": "rope", "linear_bias": False}

_FAMILIES = (
    Family(
        model_type="gpt2",
        sizes={
            "num_layers": ("n_layer", 12),
            "hidden_size": ("n_embd", 768),
            "num_attention_heads": ("n_head", 12),
            "vocab_size": ("vocab_size", 50257),
            "max_position_embeddings": ("n_positions", 1024),
            "ffn_hidden_size": ("n_inner", None),
            "norm_epsilon": ("layer_norm_epsilon", 1e-5),
            "activation": ("activation_function", "gelu_new"),
            "tied_embeddings": ("tie_word_embeddings", True),
        },
        fixed={"normalization": "LayerNorm", "position": "learned"},
        demands={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        backbone="transformer.",
        layer="h.{i}.",
        modules={
            "input_layernorm": "ln_1",
            "pre_mlp_layernorm": "ln_2",
            **dict.fromkeys("qkv", "attn.c_attn"),
            "o": "attn.c_proj",
            "fc1": "mlp.c_fc",
            "fc2": "mlp.c_proj",
        },
        embedding="wte.weight",
        positions="wpe.weight",
        final_norm="ln_f",
        head="lm_head.weight",
        fused_qkv="stacked",
        transposed=True,
        buffers=(r"h\.\d+\.attn\.(masked_)?bias",),
    ),
    Family(
        model_type="opt",
        sizes={
            **_SIZES,
            "ffn_hidden_size": ("ffn_dim", None),
            "activation": ("activation_function", "relu"),
            "linear_bias": ("enable_bias", True),
            "qkv_bias": ("enable_bias", True),
            "proj_bias": ("enable_bias", True),
            "tied_embeddings": ("tie_word_embeddings", True),
        },
        fixed={"normalization": "LayerNorm", "norm_epsilon": 1e-5, "position": "learned"},
        demands={
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "layer_norm_elementwise_affine": True,
            "word_embed_proj_dim": "hidden_size",
        },
        backbone="model.",
        layer="decoder.layers.{i}.",
        modules={
            "input_layernorm": "self_attn_layer_norm",
            "pre_mlp_layernorm": "final_layer_norm",
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "o": "self_attn.out_proj",
            "fc1": "fc1",
            "fc2": "fc2",
        },
        embedding="decoder.embed_tokens.weight",
        positions="decoder.embed_positions.weight",
        final_norm="decoder.final_layer_norm",
        head="lm_head.weight",
        unused_positions=2,
    ),
    Family(
        model_type="gpt_neox",
        sizes={
            **_SIZES,
            "ffn_hidden_size": ("intermediate_size", REQUIRED),
            "norm_epsilon": ("layer_norm_eps", 1e-5),
            "activation": ("hidden_act", "gelu"),
            "parallel_residual": ("use_parallel_residual", True),
            "qkv_bias": ("attention_bias", True),
            "proj_bias": ("attention_bias", True),
            "tied_embeddings": ("tie_word_embeddings", False),
        },
        fixed={"normalization": "LayerNorm", "position": "rope"},
        rope_keys={"rotary_base": ("rotary_emb_base", 10000.0), "rotary_percent": ("rotary_pct", 0.25)},
        backbone="gpt_neox.",
        layer="layers.{i}.",
        modules={
            "input_layernorm": "input_layernorm",
            "pre_mlp_layernorm": "post_attention_layernorm",
            **dict.fromkeys("qkv", "attention.query_key_value"),
            "o": "attention.dense",
            "fc1": "mlp.dense_h_to_4h",
            "fc2": "mlp.dense_4h_to_h",
        },
        embedding="embed_in.weight",
        final_norm="final_layer_norm",
        head="embed_out.weight",
        fused_qkv="interleaved",
        buffers=(r"layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",),
    ),
    Family(
        model_type="llama",
        sizes={
            **_LLAMA_SIZES,
            "qkv_bias": ("attention_bias", False),
            "proj_bias": ("attention_bias", False),
            "linear_bias": ("mlp_bias", False),
        },
        fixed={k: v for k, v in _LLAMA_FIXED.items() if k != "linear_bias"},
        **_LLAMA_NAMES,
    ),
    Family(
        model_type="mistral",
        sizes={
            **_LLAMA_SIZES,
            "num_query_groups": ("num_key_value_heads", 8),
            "max_position_embeddings": ("max_position_embeddings", 131072),
        },
        fixed={**_LLAMA_FIXED, "qkv_bias": False, "proj_bias": False},
        window="always",
        **_LLAMA_NAMES,
    ),
    Family(
        model_type="qwen2",
        sizes={**_LLAMA_SIZES, "max_position_embeddings": ("max_position_embeddings", 32768)},
        fixed={**_LLAMA_FIXED, "qkv_bias": True, "proj_bias": False},
        window="switch",
        **_LLAMA_NAMES,
    ),
    Family(
        model_type="qwen3",
        sizes={
            **_LLAMA_SIZES,
            "head_dim": ("head_dim", 128),
            "max_position_embeddings": ("max_position_embeddings", 32768),
            "qkv_bias": ("attention_bias", False),
            "proj_bias": ("attention_bias", False),
        },
        fixed={**_LLAMA_FIXED, "qk_norm": True},
        window="switch",
        **{
            **_LLAMA_NAMES,
            "modules": {**_LLAMA_MODULES, "q_layernorm": "self_attn.q_norm", "k_layernorm": "self_attn.k_norm"},
        },
    ),
)
FAMILIES = {family.model_type: family for family in _FAMILIES}

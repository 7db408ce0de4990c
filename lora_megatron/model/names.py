# SPDX-License-Identifier: Apache-2.0
"""Global names: what a parameter is called whatever stage, chunk or rank it sits on.

`decoder.layers.<global layer>.<rest>`; a tied output layer on the last pipeline stage is a second copy of
`embedding.word_embeddings.weight` and answers to that name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

EMBEDDING = "embedding.word_embeddings.weight"
POSITIONS = "embedding.position_embeddings.weight"
OUTPUT = "output_layer.weight"
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.*)$")
_ADAPTER = re.compile(r"^decoder\.layers\.(\d+)\.(.*)\.adapters\.(\w+)\.lora_([AB])$")

# PEFT's names, as its tuner writes them for a Llama-shaped module tree with unfused projections; a plain MLP, which
# Llama has not, keeps fc1 and fc2.
_PEFT_MODULE = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "fc1": "mlp.fc1",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "fc2": "mlp.fc2",
}
_PEFT_GATED_FC2 = "mlp.down_proj"
_LINEAR = {
    "q": "self_attention.linear_qkv",
    "k": "self_attention.linear_qkv",
    "v": "self_attention.linear_qkv",
    "o": "self_attention.linear_proj",
    "fc1": "mlp.linear_fc1",
    "gate": "mlp.linear_fc1",
    "up": "mlp.linear_fc1",
    "fc2": "mlp.linear_fc2",
}


@dataclass(frozen=True)
class Named:
    """A parameter under its global name; `is_copy` marks the second copy of a tied embedding."""

    name: str
    parameter: nn.Parameter
    is_copy: bool = False


def named_parameters(chunks: Sequence[nn.Module]) -> Iterator[Named]:
    """Every parameter of this rank's chunks (bare GPTModels), in a fixed order."""
    for chunk in chunks:
        layers: Any = chunk.decoder.layers  # type: ignore[union-attr]  # GPTModel is untyped
        tied_copy = getattr(chunk, "share_embeddings_and_output_weights", False) and not chunk.pre_process
        for name, parameter in chunk.named_parameters():
            match = _LAYER.match(name)
            if match:
                index = layers[int(match[1])].layer_number - 1
                yield Named(f"decoder.layers.{index}.{match[2]}", parameter)
            elif name == OUTPUT and tied_copy:
                yield Named(EMBEDDING, parameter, is_copy=True)
            else:
                yield Named(name, parameter)


def adapter_key(name: str, *, gated: bool) -> str:
    """The key of a trained parameter in an adapter file: PEFT's for a LoRA factor, the global name otherwise."""
    match = _ADAPTER.match(name)
    if not match:
        return name
    return f"base_model.model.model.layers.{match[1]}.{peft_module(match[3], gated=gated)}.lora_{match[4]}.weight"


def peft_module(projection: str, *, gated: bool) -> str:
    """PEFT's module path of a projection inside a layer, e.g. `self_attn.q_proj`; `gated` is the MLP."""
    return _PEFT_GATED_FC2 if gated and projection == "fc2" else _PEFT_MODULE[projection]


def linear_of(projection: str) -> str:
    """The module inside a layer that computes a projection, e.g. `self_attention.linear_qkv`."""
    return _LINEAR[projection]


def adapter_name(layer: int, projection: str, factor: str) -> str:
    """The global name of factor A or B of `projection` on global layer `layer`."""
    return f"decoder.layers.{layer}.{_LINEAR[projection]}.adapters.{projection}.lora_{factor}"

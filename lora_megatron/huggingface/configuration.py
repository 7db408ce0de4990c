# SPDX-License-Identifier: Apache-2.0
"""From a Hugging Face `config.json` to a family and a shape; what this stack cannot compute is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_megatron.errors import CheckpointError, ConfigError
from lora_megatron.huggingface.families import FAMILIES, REQUIRED, Family
from lora_megatron.layers.rope import SCALING_KEYS
from lora_megatron.model.shape import ModelShape
from lora_megatron.strict_json import load_json_object

CONFIG = "config.json"
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_MOST_LAYERS = 10_000
_DEFAULT_WINDOW = 4096
_LARGEST = {"int": 2**31, "float": 1e12}
_WANTED = {
    "int": "a whole number above 0, at most 2**31",
    "float": "a number above 0, at most 1e12",
    "bool": "true or false",
    "str": "text",
}
_KINDS = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def read_configuration(folder: Path) -> tuple[Family, ModelShape]:
    """The family and shape that `folder`/config.json describes.

    Raises:
        CheckpointError: no such file, or it is damaged, of an unsupported family or variant, or impossible.
    """
    path = folder / CONFIG
    values = load_json_object(path, "a Hugging Face model configuration", CheckpointError)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(f"{path}: model_type {kind!r} is not supported; supported are {', '.join(FAMILIES)}")
    if values.get("quantization_config") is not None:
        raise CheckpointError(f"{path}: the weights are quantised (quantization_config); give the original model")
    family = FAMILIES[kind]
    _check_demands(family, values, path)
    try:
        return family, ModelShape(**_fields(family, values, path))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _check_demands(family: Family, values: Mapping[str, Any], path: Path) -> None:
    for key, wanted in family.demands.items():
        if wanted in values and isinstance(wanted, str):  # must equal another key
            wanted = values[wanted]
        value = values.get(key)
        if value is not None and value != wanted:
            raise CheckpointError(
                f"{path}: {key} = {value!r} is a variant of {family.model_type} that is not supported, only {wanted!r}"
            )


def _fields(family: Family, values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    kinds = {name: str(kind) for name, kind in ModelShape.__annotations__.items()}
    fields = dict(family.fixed)
    for name, (key, default) in family.sizes.items():
        value = _value(values, key, default, kinds[name], path)
        if value is not None:
            fields[name] = value
    if fields["num_layers"] > _MOST_LAYERS:
        raise CheckpointError(f"{path}: {fields['num_layers']} layers; no model has more than {_MOST_LAYERS}")
    activation = fields.get("activation")
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise CheckpointError(f"{path}: the activation {activation!r} is not supported; supported are {known}")
    fields["activation"] = _ACTIVATIONS[activation]
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    if "head_dim" not in fields and hidden % heads:
        raise CheckpointError(f"{path}: {hidden} hidden dimensions do not divide into {heads} heads")
    fields.setdefault("head_dim", hidden // heads)
    fields.setdefault("num_query_groups", heads)
    fields.setdefault("ffn_hidden_size", 4 * hidden)
    if fields["position"] == "rope":
        fields |= _rotary(family, values, fields["max_position_embeddings"], path)
    return fields | _window(family, values, fields["num_layers"], path)


def _value(values: Mapping[str, Any], key: str, default: Any, kind: str, path: Path) -> Any:
    """values[key] as a plain number, switch or word; `default` where it is absent or null."""
    value = values.get(key)
    if value is None:
        if default is REQUIRED:
            raise CheckpointError(f"{path}: {key} is missing")
        return default
    if type(value) not in _KINDS[kind] or (kind in ("int", "float") and not 0 < value <= _LARGEST[kind]):
        raise CheckpointError(f"{path}: {key} = {value!r} must be {_WANTED[kind]}")
    return float(value) if kind == "float" else value


def _rotary(family: Family, values: Mapping[str, Any], length: int, path: Path) -> dict[str, Any]:
    """Base, share of the head and scaling: in `rope_parameters`, or as older files have them beside `rope_scaling`."""
    stated = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(stated, dict):
        raise CheckpointError(f"{path}: the rotary parameters must be an object, not {stated!r}")
    inside = {"rotary_base": "rope_theta", "rotary_percent": "partial_rotary_factor"}
    fields: dict[str, Any] = {}
    for name, (key, default) in family.rope_keys.items():
        outside = _value(values, key, default, "float", path)
        fields[name] = _value(stated, inside[name], outside, "float", path)
    kind = stated.get("rope_type", stated.get("type", "default"))  # `type` is the older word
    if kind == "default":
        return fields
    scaling = {key: stated[key] for key in SCALING_KEYS if stated.get(key) is not None} | {"rope_type": kind}
    if kind in ("yarn", "llama3"):
        original = _value(values, "original_max_position_embeddings", length, "int", path)
        original = _value(stated, "original_max_position_embeddings", original, "int", path)
        scaling["original_max_position_embeddings"] = original
        scaling.setdefault("factor", length / original)
    return {**fields, "rope_scaling": scaling}


def _window(family: Family, values: Mapping[str, Any], layers: int, path: Path) -> dict[str, int]:
    switch = family.window == "switch"
    if not family.window or (switch and not _value(values, "use_sliding_window", False, "bool", path)):
        return {}
    if values.get("sliding_window", "absent") is None:  # null is no window; an absent key is the class's default
        return {}
    window = _value(values, "sliding_window", _DEFAULT_WINDOW, "int", path)
    full = values.get("max_window_layers", 28) if switch else 0
    if type(full) is not int or full < 0:
        raise CheckpointError(f"{path}: max_window_layers = {full!r} must be a whole number")
    expected = ["full_attention" if layer < full else "sliding_attention" for layer in range(layers)]
    if values.get("layer_types") not in (None, expected):
        raise CheckpointError(f"{path}: layer_types mixes sliding and full attention in an order that is not supported")
    return {"sliding_window": window, "full_attention_layers": min(full, layers)}

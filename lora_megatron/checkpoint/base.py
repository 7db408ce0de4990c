# SPDX-License-Identifier: Apache-2.0
"""Base models: drawn at random, or read from a folder this project wrote (`config.json` + safetensors).

Either way a base has a fingerprint that adapters carry, so that an adapter trained on one base is refused on another.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from torch import nn

from lora_megatron.checkpoint.folder import read_manifest, write_folder, write_json
from lora_megatron.checkpoint.tensors import TensorFiles, fingerprint, is_writer, write_stage_file
from lora_megatron.config import BaseSection
from lora_megatron.errors import CheckpointError
from lora_megatron.layers.sharding import shard_of
from lora_megatron.model.initialise import initialise_base
from lora_megatron.model.names import named_parameters
from lora_megatron.model.shape import ModelShape
from lora_megatron.strict_json import load_json_object

CONFIG = "config.json"
_FORMAT = "lora_megatron-model"


@dataclass(frozen=True)
class Base:
    """Where base weights come from, before any is loaded."""

    folder: Path | None
    seed: int
    shape: ModelShape
    fingerprint: str


def describe_base(section: BaseSection, shape: ModelShape | None) -> Base:
    """What `section` names; `shape` is the configuration's, None when only the folder knows it.

    Raises:
        CheckpointError: the folder is not a complete model of this project, or another shape than the configuration's.
    """
    if section.weights == "random":
        assert shape is not None
        device = "cuda" if torch.cuda.is_available() else "cpu"  # generators of different devices draw differently
        facts = ["random", device, str(section.seed), json.dumps(shape.to_dict(), sort_keys=True)]
        return Base(None, section.seed, shape, fingerprint(facts))
    folder = Path(section.weights)
    manifest = read_manifest(folder, verify=False)
    stored = read_shape(folder)
    if shape is not None and shape != stored:
        wrong = [k for k, v in stored.to_dict().items() if shape.to_dict()[k] != v]
        details = ", ".join(f"{k} is {stored.to_dict()[k]}, not {shape.to_dict()[k]}" for k in wrong)
        raise CheckpointError(f"base.weights = {folder}: the stored model is another one: {details}")
    hashes = [f"{name}:{entry['sha256']}" for name, entry in sorted(manifest["files"].items())]
    return Base(folder, section.seed, stored, fingerprint(hashes))


def read_shape(folder: Path) -> ModelShape:
    """The shape stored in a model folder; raises CheckpointError."""
    path = folder / CONFIG
    return ModelShape.from_dict(_read_config(folder)["shape"], source=str(path))


def read_tokenizer_fingerprint(folder: Path) -> Any:
    """The fingerprint of the tokenizer a stored model was trained with, None when it does not say."""
    return _read_config(folder).get("tokenizer_fingerprint")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    values = load_json_object(path, "a model configuration written by lora_megatron", CheckpointError)
    if values.get("format") != _FORMAT or not isinstance(values.get("shape"), dict):
        raise CheckpointError(f"{path} was not written by lora_megatron (format {values.get('format')!r})")
    return values


def load_base(base: Base, chunks: Sequence[nn.Module]) -> None:
    """Fill the base parameters of this rank's chunks; adapters keep their values.

    Raises:
        CheckpointError: damaged, missing or extra tensors.
    """
    if base.folder is None:
        initialise_base(chunks, seed=base.seed, num_layers=base.shape.num_layers)
        return
    manifest = read_manifest(base.folder)
    files = [base.folder / name for name in manifest["files"] if name.endswith(".safetensors")]
    size = mpu.get_tensor_model_parallel_world_size()
    with TensorFiles(files) as tensors, torch.no_grad():
        tensors.require_names(set(manifest["tensors"]), str(base.folder))
        for named in named_parameters(chunks):
            if ".adapters." in named.name:
                continue
            shard = shard_of(named.parameter)
            full = shard.full_shape(named.parameter.shape, size)
            named.parameter.copy_(tensors.part(named.name, shard, shape=full))


def save_model(folder: Path, chunks: Sequence[nn.Module], shape: ModelShape, facts: dict[str, Any]) -> None:
    """Write the whole model as a base for later runs, one safetensors file per pipeline stage; collective.

    Raises:
        CheckpointError: the disk is full or the directory vanished; nothing half-written remains.
    """
    stage, stages = mpu.get_pipeline_model_parallel_rank(), mpu.get_pipeline_model_parallel_world_size()
    mine = [n for n in named_parameters(chunks) if ".adapters." not in n.name and not n.is_copy]

    def write(temporary: Path) -> dict[str, Any]:
        write_stage_file(
            temporary / f"model-{stage + 1:05d}-of-{stages:05d}.safetensors",
            ((n.name, n.parameter, shard_of(n.parameter)) for n in mine),
            {"format": "pt"},
        )
        if stage == 0 and is_writer():
            write_json(temporary / CONFIG, {"format": _FORMAT, "shape": shape.to_dict(), **facts})
        return {"kind": "model", "tensors": sorted(base_tensor_names(shape))}

    write_folder(folder, write, replace=True)


def base_tensor_names(shape: ModelShape) -> set[str]:
    """The global names of every base parameter of a model of this shape."""
    weights = ["weight", "bias"] if shape.linear_bias else ["weight"]
    norm = ["weight", "bias"] if shape.normalization == "LayerNorm" else ["weight"]
    linear = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    names = {"embedding.word_embeddings.weight", *(f"decoder.final_layernorm.{kind}" for kind in norm)}
    for layer in range(shape.num_layers):
        names |= {f"decoder.layers.{layer}.{module}.{kind}" for module in linear for kind in weights}
        for module in ("input_layernorm", "pre_mlp_layernorm"):
            names |= {f"decoder.layers.{layer}.{module}.{kind}" for kind in norm}
    if shape.position == "learned":
        names.add("embedding.position_embeddings.weight")
    if not shape.tied_embeddings:
        names.add("output_layer.weight")
    return names

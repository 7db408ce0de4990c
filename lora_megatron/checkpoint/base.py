# SPDX-License-Identifier: Apache-2.0
"""Base models: drawn at random, or read from a folder this project wrote (`config.json` + safetensors).

Those of Hugging Face are in `lora_megatron.huggingface`.

Either way a base has a fingerprint that adapters carry, so that an adapter trained on one base is refused on another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from torch import nn

from lora_megatron.checkpoint.folder import read_manifest, write_folder, write_json
from lora_megatron.checkpoint.tensors import TensorFiles, fingerprint, is_writer, write_stage_file
from lora_megatron.errors import CheckpointError
from lora_megatron.layers.sharding import shard_of
from lora_megatron.layers.storage.stored import writable
from lora_megatron.model.initialise import initialise_base
from lora_megatron.model.names import named_parameters
from lora_megatron.model.shape import ModelShape
from lora_megatron.parallel.heartbeat import beat
from lora_megatron.strict_json import load_json_object

CONFIG = "config.json"
_FORMAT = "lora_megatron-model"


@dataclass(frozen=True)
class Base:
    """What base weights are, before any is loaded."""

    shape: ModelShape
    fingerprint: str
    load: Callable[[Sequence[nn.Module]], None]
    """Fills the base parameters of this rank's chunks; adapters keep their values. Raises CheckpointError."""


def random_base(shape: ModelShape, *, seed: int) -> Base:
    """Weights drawn from `seed`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"  # generators of different devices draw differently
    facts = ["random", device, str(seed), json.dumps(shape.to_dict(), sort_keys=True)]
    return Base(
        shape, fingerprint(facts), lambda chunks: initialise_base(chunks, seed=seed, num_layers=shape.num_layers)
    )


def describe_base(folder: Path) -> Base:
    """The model of this project in `folder`.

    Raises:
        CheckpointError: it is not a complete model of this project.
    """
    manifest = read_manifest(folder, verify=False)
    hashes = [f"{name}:{entry['sha256']}" for name, entry in sorted(manifest["files"].items())]
    return Base(read_shape(folder), fingerprint(hashes), lambda chunks: load_base(folder, chunks))


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


def load_base(folder: Path, chunks: Sequence[nn.Module]) -> None:
    """Fill the base parameters of this rank's chunks from a model of this project; adapters keep their values.

    Raises:
        CheckpointError: damaged, missing or extra tensors.
    """
    manifest = read_manifest(folder)
    files = [folder / name for name in manifest["files"] if name.endswith(".safetensors")]
    size = mpu.get_tensor_model_parallel_world_size()
    with TensorFiles(files) as tensors, torch.no_grad():
        tensors.require_names(set(manifest["tensors"]), str(folder))
        for named in named_parameters(chunks):
            if ".adapters." in named.name:
                continue
            shard = shard_of(named.parameter)
            full = shard.full_shape(named.parameter.shape, size)
            with writable(named.parameter) as target:
                target.copy_(tensors.part(named.name, shard, shape=full))
            beat()


def save_model(
    folder: Path, chunks: Sequence[nn.Module], shape: ModelShape, facts: dict[str, Any], **more: Any
) -> None:
    """Write the whole model as a base for later runs, one safetensors file per pipeline stage; collective.

    `facts` go into its configuration, `more` into the manifest.

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
        return {"kind": "model", "tensors": sorted(base_tensor_names(shape)), **more}

    write_folder(folder, write, replace=True)


def base_tensor_names(shape: ModelShape) -> set[str]:
    """The global names of every base parameter of a model of this shape."""
    biased = {
        "self_attention.linear_qkv": shape.qkv_bias,
        "self_attention.linear_proj": shape.proj_bias,
        "mlp.linear_fc1": shape.linear_bias,
        "mlp.linear_fc2": shape.linear_bias,
        **dict.fromkeys(("input_layernorm", "pre_mlp_layernorm"), shape.normalization == "LayerNorm"),
    }
    if shape.qk_norm:
        biased |= dict.fromkeys(("self_attention.q_layernorm", "self_attention.k_layernorm"), False)
    names = {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight"}
    if shape.normalization == "LayerNorm":
        names.add("decoder.final_layernorm.bias")
    for layer in range(shape.num_layers):
        for module, has_bias in biased.items():
            names |= {f"decoder.layers.{layer}.{module}.{kind}" for kind in ("weight", "bias")[: 1 + has_bias]}
    if shape.position == "learned":
        names.add("embedding.position_embeddings.weight")
    if not shape.tied_embeddings:
        names.add("output_layer.weight")
    return names

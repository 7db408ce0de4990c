# SPDX-License-Identifier: Apache-2.0
"""A PEFT LoRA adapter of a Hugging Face base as an adapter of this project, which trains on, merges and serves.

What PEFT would pass over in silence is refused: a feature this stack has not, ranks that the tensors contradict,
targets without tensors and tensors without targets, values that are not finite. An adapter of a fused q, k, v matrix
becomes one for each of the three: the same A, and B's rows. Columns of B that are zero for all of a projection's rows
leave with their rows of A, so that what `export` stacked comes apart again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_megatron.checkpoint.adapter import CONFIG, TENSORS, describe_method, peft_config
from lora_megatron.checkpoint.folder import write_json, write_manifest
from lora_megatron.checkpoint.new_folder import new_folder
from lora_megatron.errors import CheckpointError
from lora_megatron.huggingface.checkpoint import HfCheckpoint
from lora_megatron.huggingface.families import Family
from lora_megatron.huggingface.layout import module_path, projection_rows
from lora_megatron.huggingface.peft_config import PeftConfig
from lora_megatron.huggingface.peft_export import PREFIX, PeftPair
from lora_megatron.layers.lora import scaling
from lora_megatron.methods.lora import Lora
from lora_megatron.model.names import adapter_key, adapter_name
from lora_megatron.model.shape import ModelShape
from lora_megatron.strict_safetensors import SafetensorsFile, SafetensorsWriter

Place = tuple[int, str]
"""(layer, projection)."""


def import_adapter(base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    """Write `out`, an adapter folder of this project, from PEFT's folder `adapter`; returns its facts.

    Raises:
        CheckpointError: damaged or contradictory files, features that are not supported, another base's shapes.
        ConfigError: `out` exists.
    """
    with HfCheckpoint(base) as checkpoint:
        family, shape, fingerprint = checkpoint.family, checkpoint.shape, checkpoint.fingerprint()
    config = PeftConfig(adapter)
    pairs: dict[Place, PeftPair] = {}
    for module, pair in _read_pairs(adapter, config, family, shape).items():
        pairs |= _unfused(pair, module, family, shape)
    method, pairs = _as_method(pairs, stabilised=config.stabilised and not family.fused_qkv)
    facts = {
        "base": str(base),
        "base_fingerprint": fingerprint,
        "seed": None,
        "imported_from": str(adapter),
        **describe_method(method, shape),
    }
    with new_folder(out) as folder:
        _write(folder / TENSORS, pairs, shape)
        write_json(folder / CONFIG, peft_config(method, shape, str(base)))
        write_manifest(folder, {"kind": "adapter", "adapter": facts})
    return facts


def _places(family: Family, shape: ModelShape) -> dict[str, list[Place]]:
    """Every module that can be adapted -> its (layer, projection)s."""
    places: dict[str, list[Place]] = {}
    for layer in range(shape.num_layers):
        for projection in shape.projections:
            places.setdefault(module_path(family, layer, projection), []).append((layer, projection))
    return places


def _read_pairs(adapter: Path, config: PeftConfig, family: Family, shape: ModelShape) -> dict[str, PeftPair]:
    """Module of the family -> its pair, every tensor accounted for."""
    places = _places(family, shape)
    path = adapter / TENSORS
    if not path.exists() and (adapter / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{adapter} holds adapter_model.bin: pickle files can run code and are never read; save it with PEFT's "
            "save_pretrained(DIR, safe_serialization=True) where you trust it"
        )
    with SafetensorsFile(path) as file:
        found: dict[str, dict[str, str]] = {}
        for name in file.entries:
            module, factor = _split(name, path)
            bare = module if module in places else family.backbone + module  # trained on the bare backbone
            if bare not in places:
                raise CheckpointError(
                    f"{path}: {name} adapts {module}, which is no linear layer of a {family.model_type}"
                )
            found.setdefault(bare, {})[factor] = name
        if not found:
            raise CheckpointError(f"{path} holds no tensors")
        config.check_targets(set(found), set(places))
        pairs = {}
        for module, names in found.items():
            if set(names) != {"A", "B"}:
                raise CheckpointError(f"{path}: {module} has lora_{min(names)} and not the other factor")
            projection = places[module][0][1]
            rows = projection_rows(family, shape, projection)
            rank = config.rank(module)
            sizes = {"A": (rank, shape.projection(projection)[1]), "B": (rows.groups * rows.stride, rank)}
            a, b = (_read(file, names[factor], sizes[factor]) for factor in "AB")
            pairs[module] = PeftPair(a, b, config.scale(module))
    return pairs


def _split(name: str, path: Path) -> tuple[str, str]:
    """`base_model.model.<module>.lora_A[.default].weight` -> (module, A)."""
    module, _, rest = name.removeprefix(PREFIX).rpartition(".lora_")
    factor, _, tail = rest.partition(".")
    if (
        not name.startswith(PREFIX)
        or not module
        or factor not in ("A", "B")
        or tail not in ("weight", "default.weight")
    ):
        raise CheckpointError(f"{path}: {name} is not a LoRA factor of a linear layer")
    return module, factor


def _read(file: SafetensorsFile, name: str, shape: tuple[int, int]) -> Tensor:
    stored = file.tensor(name)
    if stored.shape != shape:
        raise CheckpointError(
            f"{file.path}: {name} has shape {list(stored.shape)}, its {CONFIG} and this base call for {list(shape)}"
        )
    value: Tensor = stored[:]
    if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
        raise CheckpointError(f"{file.path}: {name} holds values that are not finite numbers")
    return value


def _unfused(pair: PeftPair, module: str, family: Family, shape: ModelShape) -> dict[Place, PeftPair]:
    """A module's pair as one for each projection in it."""
    places = _places(family, shape)[module]
    if len(places) == 1:
        return {places[0]: pair}
    parts = {}
    for place in places:
        own = projection_rows(family, shape, place[1]).rows_of(pair.b).flatten(0, 1)
        used = own.any(0) if bool(pair.b.any()) else torch.ones(own.shape[1], dtype=torch.bool)
        if bool(used.any()):
            parts[place] = PeftPair(pair.a[used].contiguous(), own[:, used].contiguous(), pair.scale)
    return parts


def _as_method(pairs: Mapping[Place, PeftPair], *, stabilised: bool) -> tuple[Lora, dict[Place, PeftPair]]:
    """The Lora with one alpha for all; where that gives another scale, B makes up for it in fp32."""

    def divisor(pair: PeftPair) -> float:
        return 1 / scaling(1.0, pair.a.shape[0], rank_stabilised=stabilised)

    alphas = Counter(round(pair.scale * divisor(pair), 9) for pair in pairs.values())
    alpha = alphas.most_common(1)[0][0]
    layers: dict[int, dict[str, int]] = {}
    scaled = {}
    for (layer, projection), pair in pairs.items():
        rank = pair.a.shape[0]
        layers.setdefault(layer, {})[projection] = rank
        ratio = pair.scale / scaling(alpha, rank, rank_stabilised=stabilised)
        if abs(ratio - 1) > 1e-12:
            pair = PeftPair(pair.a, pair.b.float() * ratio, pair.scale / ratio)
        scaled[layer, projection] = pair
    return Lora({}, alpha, stabilised, layers), scaled


def _write(path: Path, pairs: Mapping[Place, PeftPair], shape: ModelShape) -> None:
    tensors = {
        adapter_key(adapter_name(*place, factor), gated=shape.gated_mlp): tensor
        for place, pair in pairs.items()
        for factor, tensor in (("A", pair.a), ("B", pair.b))
    }
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sorted(tensors.items())]
    with SafetensorsWriter(path, entries, {"format": "pt"}) as writer:
        for name, _, _ in entries:
            writer.write(name, tensors[name])

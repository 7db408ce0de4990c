# SPDX-License-Identifier: Apache-2.0
"""A frozen model, sharded and in memory, and adapters that come and go beside it: the base's weights never change.

    model = open_model("path/to/model", layout=Layout(tensor=2))     # on every rank torchrun started
    load_adapter(model, "runs/r8/adapter", name="r8")                # loaded, and active
    load_adapter(model, "runs/r16/adapter", name="r16")
    switch(model, "r8")                                              # None is the bare base
    unload(model, "r16")

Every call is collective: all ranks make it, and if it fails on one it fails on all, with nothing changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from torch import nn

from lora_megatron.checkpoint.adapter_reader import AdapterReader
from lora_megatron.errors import CheckpointError, ConfigError
from lora_megatron.huggingface.base import open_base
from lora_megatron.layers.lora import Adapter, AdapterSet, LoraFactors
from lora_megatron.layers.sharding import shard_of
from lora_megatron.methods.lora import Lora
from lora_megatron.model.build import BuildOptions, build
from lora_megatron.model.names import linear_of
from lora_megatron.model.shape import ModelShape
from lora_megatron.parallel.agree import together
from lora_megatron.parallel.groups import Layout, build_mesh, join_world

Factors = dict[str, nn.ModuleDict]
"""Global name of a linear layer -> its factors."""


@dataclass
class LiveModel:
    """This rank's part of a model (`chunks`, megatron-core GPTModels) and of the adapters loaded into it."""

    chunks: Sequence[GPTModel]
    shape: ModelShape
    fingerprint: str
    adapters: dict[str, Factors] = field(default_factory=dict)
    active: str | None = None


def open_model(base: str | Path, *, layout: Layout | None = None, precision: str = "fp32") -> LiveModel:
    """Join the world, build the frozen model of `base` (a Hugging Face folder or one of this project's), and load it.

    Raises:
        UserError: the folder is no model, or the layout does not fit it or the world; on all ranks.
    """
    join_world()
    described = together(lambda: open_base(Path(base)))
    layout = layout or Layout()
    if not mpu.model_parallel_is_initialized():
        build_mesh(layout, seed=0)
    chunks = build(described.shape, Lora({}, 1.0), layout, BuildOptions(precision))
    together(lambda: described.load(chunks))
    for chunk in chunks:
        chunk.eval()
    return LiveModel(chunks, described.shape, described.fingerprint)


def load_adapter(model: LiveModel, path: str | Path, *, name: str | None = None) -> str:
    """Load an adapter folder beside the base and make it active; returns its name, by default the run's.

    Raises:
        CheckpointError: damaged, of another base, or of a method that changes the base's own weights.
        ConfigError: the name is taken.
    """
    folder = Path(path)
    name = name or (folder.resolve().parent.name if folder.name == "adapter" else folder.name)
    if name in model.adapters:
        raise ConfigError(f"an adapter {name!r} is loaded already: unload it, or give this one another name")
    model.adapters[name] = together(lambda: _read(model, folder))
    switch(model, name)
    return name


def switch(model: LiveModel, name: str | None) -> None:
    """Let the adapter `name` act from now on; None leaves the base alone.

    Raises:
        ConfigError: no such adapter is loaded.
    """
    if name is not None:
        _require(model, name)
    factors = {} if name is None else model.adapters[name]
    for where, linear in _linears(model):
        linear.adapters = factors.get(where, nn.ModuleDict())
    model.active = name


def unload(model: LiveModel, name: str) -> None:
    """Forget an adapter and free its memory; if it was active, the bare base is.

    Raises:
        ConfigError: no such adapter is loaded.
    """
    _require(model, name)
    if model.active == name:
        switch(model, None)
    del model.adapters[name]


def _require(model: LiveModel, name: str) -> None:
    if name not in model.adapters:
        raise ConfigError(f"no adapter {name!r} is loaded; loaded are {', '.join(sorted(model.adapters)) or 'none'}")


def _linears(model: LiveModel) -> list[tuple[str, Any]]:
    """(global name, layer) of every linear layer of this rank that can be adapted."""
    modules = sorted({linear_of(projection) for projection in model.shape.projections})
    return [
        (f"decoder.layers.{layer.layer_number - 1}.{module}", layer.get_submodule(module))
        for chunk in model.chunks
        for layer in chunk.decoder.layers
        for module in modules
    ]


def _read(model: LiveModel, folder: Path) -> Factors:
    """New factors for this rank's layers, filled from `folder`, trained no more."""
    rank, size = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
    factors: Factors = {}
    with AdapterReader(folder, model.shape, base_fingerprint=model.fingerprint) as reader, torch.no_grad():
        if reader.method is None:
            raise CheckpointError(
                f"{folder} was trained by {reader.facts.get('method')}, which changes weights of the base itself: use "
                "lora-megatron merge"
            )
        adapted: dict[str, list[tuple[int, str]]] = {}
        for layer, projection in reader.adapted():
            adapted.setdefault(f"decoder.layers.{layer}.{linear_of(projection)}", []).append((layer, projection))
        for where, linear in _linears(model):
            places = adapted.get(where, [])
            kinds = tuple(Adapter(p, reader.method.rank(i, p), reader.scale(i, p)) for i, p in places)
            factors[where] = linear.make_adapters(AdapterSet(where, kinds)).eval().requires_grad_(False)
            for layer, projection in places:
                _fill(factors[where][projection], reader, layer, projection, rank=rank, size=size)
    return factors


def _fill(pair: nn.Module, reader: AdapterReader, layer: int, projection: str, *, rank: int, size: int) -> None:
    assert isinstance(pair, LoraFactors)
    for factor, parameter in (("A", pair.lora_A), ("B", pair.lora_B)):
        parameter.copy_(reader.part(layer, projection, factor, shard_of(parameter), rank=rank, size=size))

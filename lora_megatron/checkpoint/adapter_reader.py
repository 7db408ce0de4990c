# SPDX-License-Identifier: Apache-2.0
"""An adapter folder opened without a model: what it is, and its tensors one by one, whole, on the CPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from lora_megatron.checkpoint.adapter import TENSORS, describe_method
from lora_megatron.checkpoint.folder import read_manifest
from lora_megatron.errors import CheckpointError
from lora_megatron.layers.lora import scaling
from lora_megatron.layers.sharding import Shard
from lora_megatron.methods.lora import Lora
from lora_megatron.model.names import adapter_key, adapter_name
from lora_megatron.model.shape import ModelShape
from lora_megatron.strict_safetensors import SafetensorsFile

_RANK = re.compile(r"^(\d+)\.(q|k|v|o|fc1|gate|up|fc2)$")


class AdapterReader:
    """A whole adapter folder of a base of shape `shape`; `base_fingerprint` None takes that of any base.

    `method` is the Lora it was trained as, None for methods that store trained parameters of the base themselves.

    Raises:
        CheckpointError: damaged, of another base or shape, missing or unused tensors, values that are not finite.
    """

    def __init__(self, folder: Path, shape: ModelShape, *, base_fingerprint: str | None = None) -> None:
        manifest = read_manifest(folder)
        facts = manifest.get("adapter")
        if manifest.get("kind") != "adapter" or not isinstance(facts, dict):
            raise CheckpointError(f"{folder} is not an adapter (its manifest says {manifest.get('kind')!r})")
        if base_fingerprint not in (None, facts.get("base_fingerprint")):
            raise CheckpointError(
                f"{folder} was trained on another base ({facts.get('base')}, fingerprint "
                f"{str(facts.get('base_fingerprint'))[:12]}); this base is {str(base_fingerprint)[:12]}: give the "
                "model it belongs to"
            )
        self.folder, self.shape, self.facts = folder, shape, facts
        self.method = method_of(facts, shape, folder) if facts.get("method") == "lora" else None
        self._file = SafetensorsFile(folder / TENSORS)
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _check(self) -> None:
        if self.method is None:
            return
        expected = {self._key(*where, factor) for where in self.adapted() for factor in "AB"}
        if wrong := sorted(expected ^ set(self._file.entries)):
            says = "is missing" if wrong[0] in expected else "does not belong there"
            raise CheckpointError(f"{self.folder / TENSORS}: {wrong[0]} {says}")

    def _key(self, layer: int, projection: str, factor: str) -> str:
        return adapter_key(adapter_name(layer, projection, factor), gated=self.shape.gated_mlp)

    def adapted(self) -> Iterator[tuple[int, str]]:
        """(layer, projection) of every pair."""
        assert self.method is not None
        for layer in range(self.shape.num_layers):
            for projection in self.shape.projections:
                if self.method.rank(layer, projection):
                    yield layer, projection

    def scale(self, layer: int, projection: str) -> float:
        """alpha / r or alpha / sqrt(r) of a pair."""
        assert self.method is not None
        rank = self.method.rank(layer, projection)
        return scaling(self.method.alpha, rank, rank_stabilised=self.method.rank_stabilised)

    def pair(self, layer: int, projection: str) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] as they are stored."""
        assert self.method is not None
        rank = self.method.rank(layer, projection)
        out, features = self.shape.projection(projection)
        shapes = {"A": (rank, features), "B": (out, rank)}
        a, b = (self.tensor(self._key(layer, projection, f), shape) for f, shape in shapes.items())
        return a, b

    def part(self, layer: int, projection: str, factor: str, shard: Shard, *, rank: int, size: int) -> Tensor:
        """What tensor rank `rank` of `size` holds of lora_A or lora_B of a pair; only its bytes are read."""
        assert self.method is not None
        width = self.method.rank(layer, projection)
        out, features = self.shape.projection(projection)
        shape = (width, features) if factor == "A" else (out, width)
        return self.tensor(
            self._key(layer, projection, factor), shape, lambda full: shard.part(full, shape, rank, size)
        )

    def names(self) -> list[str]:
        """Every tensor of the file."""
        return list(self._file.entries)

    def tensor(self, name: str, shape: tuple[int, ...], cut: Callable[[Any], Tensor] = lambda full: full[:]) -> Tensor:
        """A tensor of the file, of this shape and finite; `cut` takes a part of it."""
        stored = self._file.tensor(name)
        if stored.shape != shape:
            raise CheckpointError(
                f"{self.folder / TENSORS}: {name} has shape {list(stored.shape)}, this base needs {list(shape)}"
            )
        value = cut(stored)
        if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{self.folder / TENSORS}: {name} holds values that are not finite numbers")
        return value


def is_usable_alpha(value: Any) -> bool:
    """Whether a file's alpha is a number that can scale anything."""
    return type(value) in (int, float) and 1e-12 <= value <= 1e12


def method_of(facts: dict[str, Any], shape: ModelShape, folder: Path) -> Lora:
    """The Lora that `facts` of an adapter describe, rank by rank.

    Raises:
        CheckpointError: the facts make no sense for this shape.
    """
    ranks, alpha, stabilised = (facts.get(key) for key in ("ranks", "alpha", "rank_stabilised"))
    layers: dict[int, dict[str, int]] = {}
    ranks = ranks if isinstance(ranks, dict) else {}
    for key, rank in ranks.items():
        match = _RANK.match(key)
        if match and type(rank) is int and rank > 0:
            layers.setdefault(int(match[1]), {})[match[2]] = rank
    if not is_usable_alpha(alpha) or not isinstance(stabilised, bool) or not layers:
        raise CheckpointError(f"{folder}: its manifest does not describe a LoRA adapter")
    assert alpha is not None
    method = Lora({}, float(alpha), stabilised, layers)
    if describe_method(method, shape)["ranks"] != ranks:
        raise CheckpointError(
            f"{folder}: its ranks do not fit this base: {len(ranks)} projections, wrong layers or names"
        )
    return method

# SPDX-License-Identifier: Apache-2.0
"""The paper's baselines that only choose which existing parameters train (section 5.1)."""

from __future__ import annotations

from dataclasses import dataclass

from lora_megatron.layers.lora import Adapter


@dataclass(frozen=True)
class Full:
    """Fine-tuning: every parameter."""

    name: str = "full"
    trains_base: bool = True

    def adapters(self, layer: int, projection: str) -> tuple[Adapter, ...]:
        return ()

    def is_trainable(self, name: str) -> bool:
        return True


@dataclass(frozen=True)
class BitFit:
    """Bias-only: every bias vector (those of the linear layers and of LayerNorm), nothing else."""

    name: str = "bitfit"
    trains_base: bool = False

    def adapters(self, layer: int, projection: str) -> tuple[Adapter, ...]:
        return ()

    def is_trainable(self, name: str) -> bool:
        return name.endswith(".bias")


@dataclass(frozen=True)
class FineTuneTop:
    """FT^Top2: the last `layers` transformer layers, everything in them."""

    num_layers: int
    layers: int = 2
    name: str = "ft_top2"
    trains_base: bool = False

    def adapters(self, layer: int, projection: str) -> tuple[Adapter, ...]:
        return ()

    def is_trainable(self, name: str) -> bool:
        prefix, _, rest = name.partition("decoder.layers.")
        return not prefix and bool(rest) and int(rest.split(".")[0]) >= self.num_layers - self.layers

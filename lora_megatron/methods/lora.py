# SPDX-License-Identifier: Apache-2.0
"""LoRA: freeze W_0, train B A beside it (the paper's section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_megatron.config import Target
from lora_megatron.errors import ConfigError
from lora_megatron.layers.lora import Adapter, scaling

# On a gated MLP the target fc1 is two projections; each gets its own pair, as PEFT has it, and can be named singly.
TARGET_OF_PROJECTION = {"q": "q", "k": "k", "v": "v", "o": "o", "fc1": "fc1", "gate": "fc1", "up": "fc1", "fc2": "fc2"}


@dataclass(frozen=True)
class Lora:
    """Ranks per target, optionally other ranks on some layers."""

    targets: Mapping[str, int]
    alpha: float
    rank_stabilised: bool = False
    layers: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    name: str = "lora"
    trains_base: bool = False

    def rank(self, layer: int, projection: str) -> int:
        """Rank of `projection` on global layer `layer`, 0 where it is not adapted."""
        ranks = {**self.targets, **self.layers.get(layer, {})}
        return ranks.get(projection, ranks.get(TARGET_OF_PROJECTION[projection], 0))

    def adapters(self, layer: int, projection: str) -> tuple[Adapter, ...]:
        rank = self.rank(layer, projection)
        if not rank:
            return ()
        return (Adapter(projection, rank, scaling(self.alpha, rank, rank_stabilised=self.rank_stabilised)),)

    def is_trainable(self, name: str) -> bool:
        return ".adapters." in name


def parse_layers(patterns: Mapping[str, Mapping[Target, int]], num_layers: int) -> dict[int, dict[str, int]]:
    """`{"0-11,23": {"q": 8}}` -> ranks per layer index.

    Raises:
        ConfigError: a pattern is not a list of indices and ranges inside 0 .. num_layers - 1.
    """
    result: dict[int, dict[str, int]] = {}
    for pattern, ranks in patterns.items():
        for piece in pattern.split(","):
            first, dash, last = piece.strip().partition("-")
            if not first.isdecimal() or (dash and not last.isdecimal()):
                raise ConfigError(f"method.layers pattern {pattern!r}: write layer indices and ranges, e.g. 0-11,23")
            low, high = int(first), int(last or first)
            if not low <= high < num_layers:
                raise ConfigError(f"method.layers pattern {pattern!r}: layers run from 0 to {num_layers - 1}")
            for layer in range(low, high + 1):
                result.setdefault(layer, {}).update({str(target): rank for target, rank in ranks.items()})
    return result

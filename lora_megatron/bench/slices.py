# SPDX-License-Identifier: Apache-2.0
"""Models too large for the machine: which slices of them are measured, and what the slices say of the whole.

A slice has the first n layers, the embedding and the head of the real model. Every layer does the same work, so a step
takes t(n) = a + b n: two slices give a (embedding, head, loss, what a step costs at any size) and b, and t(all layers)
follows. That is an extrapolation, and every number from it is called one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lora_megatron.config import Config
from lora_megatron.errors import ConfigError
from lora_megatron.methods.baselines import FineTuneTop
from lora_megatron.methods.method import Method
from lora_megatron.model.shape import ModelShape

_MOST_UNITS = 4  # of a second slice that is larger than the first


@dataclass(frozen=True)
class Line:
    """y = start + slope x."""

    start: float
    slope: float

    @classmethod
    def through(cls, first: tuple[float, float], second: tuple[float, float]) -> Line:
        """The line through two points (x, y) with different x."""
        (x1, y1), (x2, y2) = first, second
        slope = (y2 - y1) / (x2 - x1)
        return cls(y1 - slope * x1, slope)

    def at(self, x: float) -> float:
        return self.start + self.slope * x


def check_layers(asked: int, config: Config, *, all_layers: int) -> None:
    """Raise ConfigError unless a slice of `asked` layers can be cut."""
    if not 1 <= asked <= all_layers:
        raise ConfigError(
            f"--layers {asked}: the model has {all_layers} layers, so a slice of it has 1 to {all_layers}; leave "
            "--layers out to measure as many as fit"
        )
    together, unit = config.train.recompute_unit, unit_of(config)
    chunks = unit // together
    factors = ["parallel.pipeline x virtual_pipeline"] * (chunks > 1) + ["train.recompute_unit"] * (together > 1)
    remedy = f"so choose a multiple of {' x '.join(factors)} = {unit}"
    if asked % chunks:
        raise ConfigError(
            f"--layers {asked}: every stage and chunk of the pipeline gets the same number of layers, {remedy}"
        )
    if asked % unit:
        of_each = " of each stage and chunk of the pipeline" if chunks > 1 else ""
        raise ConfigError(f"--layers {asked}: {together} layers{of_each} are recomputed together, {remedy}")


def unit_of(config: Config) -> int:
    """How many layers a slice grows by: one, or as many as are rebuilt together, on every stage and chunk."""
    return config.parallel.pipeline * config.parallel.virtual_pipeline * config.train.recompute_unit


def two_sizes(layers: int, room: int, *, unit: int) -> list[int]:
    """The slices of a method: `layers` and about half of them, for the two points of a line.

    Where there is no smaller slice the second is a larger one, if there is `room` for more layers; else there is one.
    """
    half = layers // 2 // unit * unit or unit
    if half < layers:
        return [half, layers]
    return [layers, min(room, _MOST_UNITS * unit)] if room > layers else [layers]


def most_that_fit(fits: Callable[[int], bool], *, all_layers: int, unit: int) -> int | None:
    """The most layers, a multiple of `unit`, for which `fits` holds (as it does for any fewer); None for not even one.

    `fits` is collective, and asked for the same sizes on every rank.
    """
    low, high = 0, all_layers // unit
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle * unit):
            low = middle
        else:
            high = middle - 1
    return low * unit or None


def require_equal_layers(config: Config, shape: ModelShape, method: Method, smallest: int) -> None:
    """Raise ConfigError where the layers of a model differ, so that some of them do not speak for all."""
    if config.method.layers and method.name == "lora":
        raise ConfigError(
            "method.layers gives layers different ranks, and a slice cannot stand for the whole model: leave it out, "
            "or measure all layers (--layers, or more memory)"
        )
    if config.train.recompute == "auto" or config.train.recompute_layers is not None:
        raise ConfigError(
            "train.recompute = auto, and train.recompute_layers, recompute another share of a slice than of the whole: "
            "set train.recompute to none, selective or full, or measure all layers (--layers, or more memory)"
        )
    windowed = 0 < shape.sliding_window < config.data.sequence_length
    if windowed and 0 < shape.full_attention_layers < shape.num_layers:
        raise ConfigError(
            f"model.full_attention_layers = {shape.full_attention_layers}: only some layers see everything, and a "
            "slice cannot stand for the whole model: measure all layers (--layers, or more memory)"
        )
    if isinstance(method, FineTuneTop) and smallest < method.layers:
        raise ConfigError(
            f"{method.name} trains the last {method.layers} layers, and the smaller slice would have {smallest}: raise "
            "--layers"
        )

# SPDX-License-Identifier: Apache-2.0
"""Which activations are rebuilt in the backward pass: what `train.recompute` and the keys beside it mean together.

| recompute | recompute_modules | rebuilt                                                                    |
|-----------|-------------------|----------------------------------------------------------------------------|
| none      |                   | nothing but what `layers.rebuilt` always does                              |
| selective | core_attn         | core attention of all layers, by megatron-core                             |
| selective | mlp               | fc1's output, in the first `recompute_layers` layers of each model chunk   |
| full      |                   | those layers as a whole, or all, `recompute_unit` at a time, by megatron-core |

megatron-core's own `mlp` rebuilds the whole MLP, with fc2's product, whose output a frozen fc2 never needs again. Here
`layers.frozen_mlp` makes fc1's output again, and megatron-core is not told.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lora_megatron.config import Config
from lora_megatron.errors import ConfigError
from lora_megatron.methods.method import Method
from lora_megatron.model.shape import ModelShape
from lora_megatron.parallel.groups import Layout

CORE_ATTENTION: tuple[str, ...] = ("core_attn",)
MLP: tuple[str, ...] = ("mlp",)
NOTHING_RECOMPUTED: dict[str, Any] = {
    "recompute": "none",
    "recompute_modules": CORE_ATTENTION,
    "recompute_layers": None,
    "recompute_unit": 1,
}
"""In the words of `train` and of `BuildOptions`; for what has no backward pass, or is not run."""


def rebuilds_attention(recompute: str, modules: Collection[str]) -> bool:
    """Whether core attention is rebuilt by itself."""
    return recompute == "selective" and "core_attn" in modules


def rebuilt_layers(recompute: str, asked: int | None, layers: int) -> int:
    """How many of a chunk's `layers`, from the first, are rebuilt as a whole; `asked` is `train.recompute_layers`."""
    return _first(asked, layers) if recompute == "full" else 0


def first_of_units(recompute: str, asked: int | None, unit: int, layers: int) -> range:
    """The first ones of the layers that are rebuilt together as a whole, `unit` at a time."""
    return range(0, rebuilt_layers(recompute, asked, layers), unit)


def rebuilt_mlps(recompute: str, modules: Collection[str], asked: int | None, layers: int) -> int:
    """Likewise, in how many fc1's output is made again if their MLP is frozen."""
    return _first(asked, layers) if recompute == "selective" and "mlp" in modules else 0


def _first(asked: int | None, layers: int) -> int:
    return layers if asked is None else min(asked, layers)


def mlp_is_frozen(shape: ModelShape, method: Method, layer: int) -> bool:
    """Whether neither fc1 nor fc2 of a global layer trains, adapters aside, nor the bias between them."""
    names = ["linear_fc1.weight", "linear_fc2.weight", *(["linear_fc1.bias"] if shape.linear_bias else [])]
    return not any(method.is_trainable(f"decoder.layers.{layer}.mlp.{name}") for name in names)


def has_frozen_mlp(shape: ModelShape, method: Method) -> bool:
    """Whether any layer's is."""
    return any(mlp_is_frozen(shape, method, layer) for layer in range(shape.num_layers))


def without_mlp(config: Config) -> Config:
    """`config` for a method whose MLPs train: what it says of rebuilding them is left out."""
    if "mlp" not in config.train.recompute_modules:
        return config
    others = tuple(module for module in config.train.recompute_modules if module != "mlp")
    left = {"recompute_modules": others, "recompute_layers": None} if others else NOTHING_RECOMPUTED
    return config.model_copy(update={"train": config.train.model_copy(update=left)})


def check_recomputation(config: Config, layout: Layout, shape: ModelShape, method: Method) -> None:
    """Raise ConfigError for what contradicts itself, asks for more layers than there are, or leaves none to rebuild."""
    layers = shape.num_layers // (layout.pipeline * layout.virtual_pipeline)
    _check_unit(config, layers)
    _check_modules(config, shape, method)
    asked, how, modules = config.train.recompute_layers, config.train.recompute, config.train.recompute_modules
    if asked is None:
        return
    if not (rebuilt_layers(how, asked, layers) or rebuilt_mlps(how, modules, asked, layers)):
        of = f" of {_list(modules)}" if how == "selective" else ""
        raise ConfigError(
            f"train.recompute_layers = {asked} goes with train.recompute = full, or selective of [mlp], not {how}{of}: "
            "leave it out, or set train.recompute=full"
        )
    if asked > layers:
        raise ConfigError(
            f"train.recompute_layers = {asked}: a model chunk of this layout has {layers} layer{'s'[: layers > 1]}; "
            f"give at most {layers}, or leave it out to recompute all"
        )


def _check_modules(config: Config, shape: ModelShape, method: Method) -> None:
    how, modules = config.train.recompute, config.train.recompute_modules
    if how != "selective" and set(modules) != set(CORE_ATTENTION):
        raise ConfigError(
            f"train.recompute_modules = {_list(modules)} goes with train.recompute = selective, not {how}: leave it "
            "out, or set train.recompute=selective"
        )
    if "mlp" in modules and not has_frozen_mlp(shape, method):
        raise ConfigError(
            f"train.recompute_modules = {_list(modules)}: mlp is for frozen MLPs, and method.name = {method.name} "
            "trains that of every layer: take it out, or set train.recompute=full"
        )


def _check_unit(config: Config, layers: int) -> None:
    unit = config.train.recompute_unit
    if unit > 1 and (config.train.recompute != "full" or config.train.recompute_layers is not None):
        raise ConfigError(
            f"train.recompute_unit = {unit} goes with train.recompute = full of all layers: leave it out, or set "
            "train.recompute=full without train.recompute_layers"
        )
    if layers == 1 < unit:
        raise ConfigError(f"train.recompute_unit = {unit}: a model chunk of this layout has 1 layer; leave it out")
    if layers % unit:
        raise ConfigError(
            f"train.recompute_unit = {unit} does not divide the {layers} layers of a model chunk of this layout: give "
            f"one of {', '.join(str(n) for n in range(1, layers + 1) if layers % n == 0)}"
        )


def _list(modules: Collection[str]) -> str:
    return f"[{', '.join(modules)}]"

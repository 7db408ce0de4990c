# SPDX-License-Identifier: Apache-2.0
"""From the section `base` to the formats of frozen weights, and whether a model can have them."""

from __future__ import annotations

from lora_megatron.config import Config
from lora_megatron.errors import ConfigError
from lora_megatron.layers.storage.choose import StorageFormat
from lora_megatron.layers.storage.nf4 import BLOCK
from lora_megatron.methods.method import Method
from lora_megatron.model.names import EMBEDDING, OUTPUT
from lora_megatron.model.shape import ModelShape
from lora_megatron.parallel.groups import Layout


def storage_of(config: Config) -> StorageFormat | None:
    """The configuration's format of frozen linear weights, None for that of `train.precision`.

    Raises:
        ConfigError: it contradicts `train.precision` or the method, or another key of `base` has nothing to speak of.
    """
    storage, gemm, precision = config.base.storage, config.base.gemm, config.train.precision
    if gemm is not None and storage != "nf4":
        raise ConfigError(
            f"base.gemm = {gemm} says what NF4 weights are multiplied in: set base.storage=nf4, or drop it"
        )
    # An FP8 head has products that add up too; but it is always kept turned round, whatever the linear layers do.
    for key, of_head in (("fast_accum", True), ("transposes", False), ("transposes_kept", False)):
        has_any = storage == "fp8" or gemm == "fp8" or (of_head and config.base.head == "fp8")
        if getattr(config.base, key) is not None and not has_any:
            what, way = ("products", ", base.head=fp8") if of_head else ("linear layers", "")
            raise ConfigError(
                f"base.{key} = {getattr(config.base, key)} is about FP8 {what}: set base.storage=fp8, or "
                f"base.storage=nf4 and base.gemm=fp8{way}, or drop it"
            )
    if storage in (None, precision):
        return None
    assert storage is not None
    if storage == "bf16":
        raise ConfigError(f"base.storage = bf16 is not train.precision = {precision}: make them the same, or drop it")
    if config.method.name == "full":
        raise ConfigError(
            f"base.storage = {storage} keeps frozen weights, and method.name = full freezes none: drop it"
        )
    parallel = config.parallel
    group = parallel.pipeline if parallel.virtual_pipeline > 1 else 1
    uses = {"kept": 0, "group": group, "host": group}.get(config.base.transposes or "anew", 1)
    return StorageFormat(storage, "fp8" if gemm == "fp8" else "bf16", config.base.fast_accum or "forward", uses)


def head_of(config: Config) -> StorageFormat | None:
    """The configuration's format of the frozen output layer's weight, None for `train.precision`.

    Raises:
        ConfigError: it contradicts `train.precision`.
    """
    head, precision = config.base.head, config.train.precision
    if head == "fp8":
        return StorageFormat("fp8", fast_accum=config.base.fast_accum or "forward", transposes=0)
    if head not in (None, precision):
        raise ConfigError(f"base.head = {head} is not train.precision = {precision}: make them the same, or drop it")
    return None


def check_head(config: Config, shape: ModelShape, method: Method) -> None:
    """Raise ConfigError where the output layer's weight has no such format, or would have to be trained in it."""
    if head_of(config) is None:
        return
    weight = EMBEDDING if shape.tied_embeddings else OUTPUT
    if method.is_trainable(weight):
        raise ConfigError(
            f"base.head = {config.base.head} is of a frozen output layer, and method.name = {method.name} trains "
            f"{weight}: drop it"
        )


def check_storage(config: Config, layout: Layout, shape: ModelShape) -> None:
    """Raise ConfigError where the format cannot hold this model's weights as they are cut."""
    storage = storage_of(config)
    if storage is None or storage.kind != "nf4":
        return
    inputs = {
        "hidden_size": shape.hidden_size,
        "num_attention_heads x head_dim": shape.num_attention_heads * shape.head_dim // layout.tensor,
        "ffn_hidden_size": shape.ffn_hidden_size // layout.tensor,
    }
    for name, size in inputs.items():
        if size % BLOCK:
            raise ConfigError(
                f"base.storage = nf4 packs blocks of {BLOCK} inputs, and a rank has {size} of model.{name}: choose "
                "fp8, or another parallel.tensor"
            )

# SPDX-License-Identifier: Apache-2.0
"""Which FP8 weights of a rank stay turned round on the GPU, and which in the host's memory (`base.transposes`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from torch import nn

from lora_megatron.layers.storage.fp8 import Fp8Products
from lora_megatron.layers.storage.host_transposes import HostTransposes
from lora_megatron.model.gpt import Gpt

FEWEST_AHEAD = 2
"""The weights of an MLP."""


def keep_transposes(chunks: Sequence[Gpt], *, last: int, in_host: bool) -> None:
    """Of the last so many layers that have FP8 products on the GPU for good; of the others, MLPs' in the host."""
    found = [(index, _products(layer)) for index, chunk in enumerate(chunks) for layer in chunk.decoder.layers]
    layers = [(index, products) for index, products in found if products]
    others = max(len(layers) - last, 0)
    for _, products in layers[others:]:
        for one in products.values():
            one.transposes = 0
    mlps = [(index, one) for index, products in layers[:others] for name, one in products.items() if is_of_mlp(name)]
    if in_host and mlps:
        counts = Counter(index for index, _ in mlps)
        host = HostTransposes(weights_ahead(counts.values(), several=mlps[0][1].transposes > 1))
        for _, one in mlps:
            one.host = host
        for one in (one for _, products in layers for one in products.values()):
            one.told = host


def is_of_mlp(name: str) -> bool:
    """Whether a layer's part of this name is kept in the host, if any is.

    They are two thirds of a GPT layer. What comes from the host has to come while the layer's products run, and of
    GPT-3 175B, two microbatches of 2048 tokens at a time, all of it would not over PCIe 5.0.
    """
    return ".mlp." in f".{name}"


def weights_ahead(counts: Iterable[int], *, several: bool) -> int:
    """How many are brought before they are asked for, where model chunks have so many: as many as the microbatches of a
    group read, each of them, before the next chunk's; where no group does (not `several`) those of an MLP."""
    return max(*counts, FEWEST_AHEAD) if several else FEWEST_AHEAD


def _products(layer: nn.Module) -> dict[str, Fp8Products]:
    return {name: module for name, module in layer.named_modules() if isinstance(module, Fp8Products)}

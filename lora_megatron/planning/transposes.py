# SPDX-License-Identifier: Apache-2.0
"""Bytes of what the products of stored weights read: NF4 unpacked, FP8 turned round, on the GPU and on the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence

from lora_megatron.config import BaseSection
from lora_megatron.layers.storage.host_transposes import places
from lora_megatron.model.transposes import is_of_mlp, weights_ahead
from lora_megatron.planning.weights import STORAGE, Weight


def unpacked_bytes(weights: Sequence[Weight], base: BaseSection, *, read_backward: Container[str]) -> int:
    """The most that a stored weight's products read at once: the largest in the precision they are done in, FP8 turned
    round or NF4 unpacked; or what is kept turned round, and NF4 unpacked beside it. Where all FP8 is kept turned round
    none is read beside that. 0 where nothing is stored.

    `read_backward`: names of the weights that have a backward product. Others are never turned round: those below what
    trains (`gradients`).
    """
    frozen = [w for w in weights if base.storage in STORAGE and w.is_linear and not w.trained]
    turned = [weight for weight in frozen if weight.name in read_backward]
    in_fp8 = base.storage == "fp8" or base.gemm == "fp8"
    read = turned if base.storage == "fp8" else frozen
    largest = max((w.size * (1 if in_fp8 else w.itemsize) for w in read), default=0)
    several = len({weight.chunk for weight in weights}) > 1
    lasting, others = _kept_and_others(turned, base.transposes_kept or 0)
    kept = _size(lasting)
    if base.storage == "fp8" and kept + (base.transposes == "kept") * _size(others) == _size(turned):
        return _size(turned)
    beside = _kept_of_others(others, base.transposes or "anew", several=several)
    at_once = base.storage == "nf4" or base.transposes == "host"  # the first pass turns round what goes to the host
    return kept + max(largest, beside + (largest if beside and at_once else 0))


def host_bytes(weights: Sequence[Weight], base: BaseSection, *, read_backward: Container[str]) -> int:
    """FP8 codes turned round that the host keeps for this rank, locked (`base.transposes` host)."""
    if base.transposes != "host":
        return 0
    turned = [w for w in weights if w.is_linear and not w.trained and w.name in read_backward]
    _, others = _kept_and_others(turned, base.transposes_kept or 0)
    return _size([weight for weight in others if is_of_mlp(weight.name)])


def _kept_and_others(turned: Sequence[Weight], kept: int) -> tuple[list[Weight], list[Weight]]:
    """Those of the last `kept` layers, and the others.

    `turned`: those that have a backward product, the last of the stage's frozen ones: so the last layers of them are
    the last that the model keeps them of (`model.transposes`).
    """
    layers: dict[tuple[int, str], list[Weight]] = {}
    for weight in turned:
        layer = weight.chunk, weight.name.split(".mlp.")[0].split(".self_attention.")[0]
        layers.setdefault(layer, []).append(weight)
    last = max(len(layers) - kept, 0)
    others, lasting = [*layers.values()][:last], [*layers.values()][last:]
    return [w for layer in lasting for w in layer], [w for layer in others for w in layer]


def _kept_of_others(others: Sequence[Weight], transposes: str, *, several: bool) -> int:
    """By `base.transposes`: of the largest of `several` model chunks, or all; MLPs' that are on their way from the host
    or have come."""
    mlps = [weight for weight in others if is_of_mlp(weight.name)] if transposes == "host" else []
    ways = 0
    if mlps:
        # Of those with a backward product, where the model counts all (`model.transposes`): fewer only in the chunk of
        # the lowest of them, and that the others of a chunk are kept can only be so in the last.
        ahead = weights_ahead(Counter(weight.chunk for weight in mlps).values(), several=several)
        ways = min(places(ahead), len(mlps)) * max(weight.size for weight in mlps)
    if transposes == "kept":
        return _size(others)
    if transposes == "anew" or not several:
        return ways
    chunks = Counter[int]()
    for weight in others:
        chunks[weight.chunk] += 0 if mlps and is_of_mlp(weight.name) else weight.size
    return ways + max(chunks.values(), default=0)


def _size(weights: Sequence[Weight]) -> int:
    return sum(weight.size for weight in weights)

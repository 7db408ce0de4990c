# SPDX-License-Identifier: Apache-2.0
"""The ceiling: how fast this device multiplies the model's own matrices when nothing else is going on.

For each linear layer W [out, in] of this tensor rank and its M = s b rows per microbatch there are three products:

    forward   x [M, in] W^T        dgrad   dy [M, out] W        wgrad   dy^T x

each of 2 M in out FLOPs. A frozen layer needs the first two, a trained one all three. They are timed as training calls
them: in its precision and type, by torch, on random numbers, over so many copies that no operand waits in a cache. The
rate of a mix is its FLOPs over its time, so each product weighs what it weighs in the model.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_megatron.bench.timing import now
from lora_megatron.model.build import DTYPES, padded_vocabulary
from lora_megatron.model.shape import ModelShape
from lora_megatron.parallel.agree import gather_text

FORWARD, DGRAD, WGRAD = "forward", "dgrad", "wgrad"
FROZEN_PRODUCTS = (FORWARD, DGRAD)
TRAINED_PRODUCTS = (FORWARD, DGRAD, WGRAD)
_PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    FORWARD: lambda x, weight, dy: torch.matmul(x, weight.t()),
    DGRAD: lambda x, weight, dy: dy @ weight,
    WGRAD: lambda x, weight, dy: dy.t().matmul(x),
}
GPU_SECONDS, CPU_SECONDS = 0.25, 0.03  # that one product is timed for
_REPEATS = 5
_CACHES = 3  # operands of one round fill the last cache this many times
_CPU_CACHE_BYTES = 32 * 2**20  # torch does not tell; a larger last level makes the ceiling a little too high
_MOST_COPIES = 64


@dataclass(frozen=True)
class Linear:
    """One linear layer on a tensor rank."""

    name: str
    out_features: int
    in_features: int
    in_every_layer: bool = True


@dataclass(frozen=True)
class Product:
    """What one kind of product of one linear layer took (the median of several repeats)."""

    linear: Linear
    kind: str
    m: int
    seconds: float

    @property
    def flops(self) -> int:
        """2 M in out."""
        return 2 * self.m * self.linear.in_features * self.linear.out_features


def linears_of(shape: ModelShape, *, tensor: int) -> list[Linear]:
    """The linear layers of one tensor rank, the output layer among them."""
    h, f = shape.hidden_size, shape.ffn_hidden_size
    queries = shape.num_attention_heads * shape.head_dim
    qkv = queries + 2 * shape.num_query_groups * shape.head_dim
    return [
        Linear("qkv", qkv // tensor, h),
        Linear("proj", h, queries // tensor),
        Linear("fc1", (2 if shape.gated_mlp else 1) * f // tensor, h),
        Linear("fc2", h, f // tensor),
        Linear("output", padded_vocabulary(shape.vocab_size, tensor) // tensor, h, in_every_layer=False),
    ]


def measure_products(
    linears: Sequence[Linear], *, m: int, precision: str, seconds: float | None = None
) -> tuple[list[Product], list[str]]:
    """Every product of every linear layer, timed over `seconds` at least; and the layers that had no room to be timed.

    All ranks measure at once, as all compute at once in training.
    """
    seconds = seconds or (GPU_SECONDS if torch.cuda.is_available() else CPU_SECONDS)
    products: list[Product] = []
    without_room: list[str] = []
    for linear in linears:
        try:
            products += _measure(linear, m, DTYPES[precision], seconds / _REPEATS)
        except torch.OutOfMemoryError:
            without_room.append(linear.name)
        torch.cuda.empty_cache()
    return products, without_room


def _measure(linear: Linear, m: int, dtype: torch.dtype, seconds: float) -> list[Product]:
    out, features = linear.out_features, linear.in_features
    item = torch.empty((), dtype=dtype).element_size()
    smallest = min(m * features + out * features, m * out + out * features, m * (out + features)) * item
    copies = min(_MOST_COPIES, max(1, -(-_CACHES * _cache_bytes() // smallest)))
    device = torch.cuda.current_device()
    operands = [
        tuple(torch.randn(size, device=device, dtype=dtype) for size in ((m, features), (out, features), (m, out)))
        for _ in range(copies)
    ]
    return [Product(linear, kind, m, _seconds_of(multiply, operands, seconds)) for kind, multiply in _PRODUCTS.items()]


def _seconds_of(multiply: Callable[..., Tensor], operands: Sequence[tuple[Tensor, ...]], seconds: float) -> float:
    """Median over repeats of the mean time of one product; a repeat goes round all operands as often as it must."""
    rounds = 1
    while (taken := _time_rounds(multiply, operands, rounds)) < seconds:  # these are the warm-up as well
        rounds = max(2 * rounds, round(rounds * seconds / max(taken, 1e-9)))
    repeats = [_time_rounds(multiply, operands, rounds) for _ in range(_REPEATS)]
    return statistics.median(repeats) / (rounds * len(operands))


def _time_rounds(multiply: Callable[..., Tensor], operands: Sequence[tuple[Tensor, ...]], rounds: int) -> float:
    started = now()
    for _ in range(rounds):
        for operand in operands:
            multiply(*operand)
    return now() - started


def _cache_bytes() -> int:
    if not torch.cuda.is_available():
        return _CPU_CACHE_BYTES
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(getattr(properties, "L2_cache_size", 0)) or 64 * 2**20


def ceiling(products: Sequence[Product], kinds: Sequence[str], *, layers: int) -> float | None:
    """FLOP/s of the products of these kinds in a model of so many layers and one output layer; None without any."""
    flops, seconds = 0, 0.0
    for product in products:
        if product.kind in kinds:
            count = layers if product.linear.in_every_layer else 1
            flops += count * product.flops
            seconds += count * product.seconds
    return flops / seconds if seconds else None


def mean_over_ranks(products: Sequence[Product]) -> list[Product]:
    """The products that every rank could time, with the mean of all ranks' seconds, on every rank; collective."""
    mine = {f"{product.linear.name} {product.kind}": product.seconds for product in products}
    by_rank = [json.loads(text) for text in gather_text(json.dumps(mine))]
    found = []
    for product, name in zip(products, mine, strict=True):
        seconds = [theirs[name] for theirs in by_rank if name in theirs]
        if len(seconds) == len(by_rank):
            found.append(replace(product, seconds=statistics.fmean(seconds)))
    return found


def mean_of(before: Sequence[Product], after: Sequence[Product]) -> list[Product]:
    """The same products with the mean of two measurements' seconds; what was measured once only stays."""
    later = {(product.linear, product.kind): product.seconds for product in after}
    return [replace(p, seconds=statistics.fmean((p.seconds, later.get((p.linear, p.kind), p.seconds)))) for p in before]

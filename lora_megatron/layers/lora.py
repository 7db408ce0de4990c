# SPDX-License-Identifier: Apache-2.0
"""The algebra of LoRA, sharding-free: factors and their initial values.

    h = W_0 x + (alpha / r) B A x        (LoRA paper, section 4.1, equation 3)

A is [r, in], B is [out, r]. B starts at zero, so training starts at the pretrained model. A is drawn as the paper's
released code draws it, kaiming-uniform with a = sqrt(5), that is U(-1/sqrt(in), 1/sqrt(in)).

Everything random depends only on (seed, name, sample), never on the rank: the full tensor is drawn and cut, so a
result cannot change with the layout.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_megatron.layers.sharding import Shard, declare


@dataclass(frozen=True)
class Adapter:
    """One low-rank pair on one projection."""

    target: str
    rank: int
    scale: float


@dataclass(frozen=True)
class AdapterSet:
    """The adapters of one linear layer; `name` is its global name, the same under every layout."""

    name: str
    adapters: tuple[Adapter, ...] = ()
    dropout: float = 0.0
    seed: int = 0

    @property
    def rank(self) -> int:
        """Of all together: columns of the layer's u."""
        return sum(adapter.rank for adapter in self.adapters)


def scaling(alpha: float, rank: int, *, rank_stabilised: bool = False) -> float:
    """alpha / r (the paper), or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023)."""
    return alpha / math.sqrt(rank) if rank_stabilised else alpha / rank


def seed_from(*parts: object) -> int:
    """A 63-bit seed from any printable parts, the same on every machine and rank."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class LoraFactors(nn.Module):
    """The pair of one adapter on this rank: `lora_A` [r, in / t or in] and `lora_B` [out or out / t, r].

    Args:
        adapter: target, rank and scale.
        in_features, out_features: sizes of the full projection.
        shard_a, shard_b: how each factor is cut.
        partial_a, partial_b: that factor's gradient is a partial sum over sequence shards.
        seed, name: what the initial A is a function of.
    """

    def __init__(
        self,
        adapter: Adapter,
        *,
        in_features: int,
        out_features: int,
        shard_a: Shard,
        shard_b: Shard,
        partial_a: bool,
        partial_b: bool,
        tensor_rank: int,
        tensor_size: int,
        seed: int,
        name: str,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        self.scale = adapter.scale
        full_a, full_b = (adapter.rank, in_features), (out_features, adapter.rank)
        a = torch.empty(full_a, device="meta") if _on_meta(device) else self._initial_a(full_a, seed, name)
        part_a = shard_a.part(a, full_a, tensor_rank, tensor_size)
        part_b = shard_b.part(torch.empty(full_b, device="meta"), full_b, tensor_rank, tensor_size)
        self.lora_A = nn.Parameter(part_a.to(device=device, dtype=dtype, copy=True).contiguous())
        self.lora_B = nn.Parameter(torch.zeros(part_b.shape, device=device, dtype=dtype))
        declare(self.lora_A, shard_a, sum_over_sequence_shards=partial_a)
        declare(self.lora_B, shard_b, sum_over_sequence_shards=partial_b)

    @staticmethod
    def _initial_a(shape: tuple[int, int], seed: int, name: str) -> Tensor:
        bound = 1 / math.sqrt(shape[1])  # the full fan-in: a shard's would grow A with sqrt(tensor size)
        generator = torch.Generator().manual_seed(seed_from(seed, "lora_A", name))
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _on_meta(device: torch.device | str | None) -> bool:
    return torch.device(device).type == "meta" if device is not None else torch.empty(0).is_meta

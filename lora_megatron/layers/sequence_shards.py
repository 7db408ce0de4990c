# SPDX-License-Identifier: Apache-2.0
"""Products under sequence parallelism, where each tensor rank holds the tokens of its part of the sequence.

    all tokens    y = (x of all ranks) M        gathered before a column layer, and before a row layer's gradient
    own tokens    y_r = sum over ranks of their (x M) at r's tokens     after a row layer, and a column layer's gradient

What travels is what the product reads: a frozen FP8 weight multiplies codes, and a token has a scale of its own, so it
is the same whether tokens are quantised before they are gathered or after, and before means half the bytes of bf16.
With an `Exchange` the tokens travel behind the products of those that are there already.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lora_megatron.layers.exchange import Exchange, exchange_over
from lora_megatron.layers.storage.product import Product


@dataclass(frozen=True)
class SequenceShards:
    """The ranks among which the tokens of a sequence are spread."""

    group: dist.ProcessGroup
    exchange: Exchange | None = None

    @classmethod
    def over(cls, group: dist.ProcessGroup, *, overlap: bool, device: torch.device) -> SequenceShards:
        """`overlap`: with an exchange where there are GPUs; a CPU's collectives have nothing to hide behind."""
        return cls(group, exchange_over(group) if overlap and device.type == "cuda" else None)

    def product_of_all(self, product: Product, *parts: Tensor) -> Tensor:
        """The product of all ranks' tokens, in their order: `parts` of this rank's m rows -> [t m, n]."""
        if self.exchange is not None:
            return self.exchange.product_of_all(product, parts)
        return product.of(*(_gathered(part, self.group) for part in parts))

    def sum_of_products(self, product: Product, *parts: Tensor) -> Tensor:
        """This rank's tokens of the sum of all ranks' products: `parts` of t m rows -> [m, n]."""
        if self.exchange is not None:
            return self.exchange.sum_of_products(product, parts)
        partial = product.of(*parts)
        own = partial.new_empty(partial.shape[0] // self.group.size(), partial.shape[1])
        dist.reduce_scatter_tensor(own, partial, group=self.group)
        return own


def _gathered(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    whole = part.new_empty(part.shape[0] * group.size(), part.shape[1])
    dist.all_gather_into_tensor(_sent(whole), _sent(part), group=group)
    return whole


def _sent(part: Tensor) -> Tensor:
    """As a type that every backend knows."""
    return part.view(torch.uint8) if part.element_size() == 1 else part

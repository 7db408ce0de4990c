# SPDX-License-Identifier: Apache-2.0
"""Products under sequence parallelism, where each tensor rank holds the tokens of its part of the sequence.

    all tokens    y = (x of all ranks) M        gathered before a column layer, and before a row layer's gradient
    own tokens    y_r = sum over ranks of their (x M) at r's tokens     after a row layer, and a column layer's gradient

What travels is what the product reads: a frozen FP8 weight multiplies codes, and a token has a scale of its own, so it
is the same whether tokens are quantised before they are gathered or after, and before means half the bytes of bf16.
With an `Exchange` the tokens travel behind the products of those that are there already.

What adapters have of each token, u = x A^T or its gradient, goes `beside` the tokens, gathered or summed with them: in
an exchange's box, behind its one barrier; without an exchange by a collective of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lora_megatron.layers.aside import FOR_COPIES
from lora_megatron.layers.exchange import Exchange, exchange_over
from lora_megatron.layers.low_rank_input import add_input_gradient
from lora_megatron.layers.storage.product import Product


@dataclass(frozen=True)
class SequenceShards:
    """The ranks among which the tokens of a sequence are spread."""

    group: dist.ProcessGroup
    exchange: Exchange | None = None

    @classmethod
    def over(cls, group: dist.ProcessGroup, *, overlap: bool, device: torch.device, beside: int = 0) -> SequenceShards:
        """`overlap`: with an exchange where there are GPUs; a CPU's collectives have nothing to hide behind.

        beside: columns that this layer will send beside its tokens.
        """
        if not (overlap and device.type == "cuda"):
            return cls(group)
        exchange = exchange_over(group)
        exchange.beside = max(exchange.beside, beside)
        return cls(group, exchange)

    def product_of_all(
        self,
        product: Product,
        *parts: Tensor,
        beside: Tensor | None = None,
        on_own: Callable[[Tensor], object] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The product of all ranks' tokens, in their order: `parts` of this rank's m rows -> [t m, n]; and `beside`
        [s/t, b, k] of all of them -> [s, b, k]. on_own: as of an exchange, and for one alone."""
        if self.exchange is not None:
            return self.exchange.product_of_all(product, parts, beside, on_own)
        assert on_own is None, "without an exchange there is nothing beside which to do it"
        output = product.of(*(_gathered(part, self.group) for part in parts))
        return output, None if beside is None else _gathered(beside.contiguous(), self.group)

    def sum_of_products(
        self, product: Product, *parts: Tensor, beside: Tensor | None = None, factors: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """This rank's tokens of the sum of all ranks' products: `parts` of t m rows -> [m, n]; and of the sum of their
        `beside` [s, b, k] -> [s/t, b, k].

        factors: A's [r, n] of which, one below the other, `beside` is a gradient's left factor: du A is added to the
        rows.
        """
        assert beside is not None or not factors
        if self.exchange is not None:
            return self.exchange.sum_of_products(product, parts, beside, factors)
        output = _scattered(product.of(*parts), self.group)
        if beside is None:
            return output, None
        own = _scattered(beside.contiguous(), self.group)
        return (add_input_gradient(output, own, factors, None) if factors else output), own

    def own_of(self, tokens: int) -> slice:
        """Of all ranks' tokens, this rank's."""
        share = tokens // self.group.size()
        return slice(self.group.rank() * share, (self.group.rank() + 1) * share)

    def of_all(self, own: Tensor) -> Tensor:
        """What goes beside tokens, where they stay: [s/t, b, k] -> [s, b, k]."""
        FOR_COPIES.wait()  # here they are rows, not beside them
        rows = own.flatten(0, -2).contiguous()
        return self.product_of_all(_as_they_are(rows), rows)[0].view(-1, *own.shape[1:])

    def sum_of(self, partial: Tensor) -> Tensor:
        """Likewise [s, b, k] -> [s/t, b, k]."""
        FOR_COPIES.wait()
        rows = partial.flatten(0, -2).contiguous()
        return self.sum_of_products(_as_they_are(rows), rows)[0].view(-1, *partial.shape[1:])


def _as_they_are(rows: Tensor) -> Product:
    """Of rows with the identity."""
    return Product(rows.shape[1], rows.dtype, lambda x: (x,), lambda out, x: out.copy_(x))


def _gathered(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    whole = part.new_empty(part.shape[0] * group.size(), *part.shape[1:])
    dist.all_gather_into_tensor(_sent(whole), _sent(part), group=group)
    return whole


def _scattered(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    own = partial.new_empty(partial.shape[0] // group.size(), *partial.shape[1:])
    dist.reduce_scatter_tensor(own, partial, group=group)
    return own


def _sent(part: Tensor) -> Tensor:
    """As a type that every backend knows."""
    return part.view(torch.uint8) if part.element_size() == 1 else part

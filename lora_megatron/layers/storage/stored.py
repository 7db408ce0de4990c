# SPDX-License-Identifier: Apache-2.0
"""The seam between a frozen linear layer and the format its weight is kept in.

A layer whose weight is stored keeps a parameter of the right shape on the meta device: a name, a shape and a sharding
declaration without bytes, which is all that loaders and counters ask for. The bytes are in a `Stored` module beside
it. A loader writes through `writable`, one tensor at a time, so that no more than one weight of a shard ever exists
unpacked.

What a format promises:

- A shard is quantised exactly as its part of the whole weight would be. Scales therefore run along the axis that is
  not cut: over the inputs of a row of W for a column-parallel layer (`axis` 0), over the outputs of a column for a
  row-parallel one (`axis` 1). Nothing has to be agreed between ranks, and results do not depend on their number.
- The backward pass unpacks again from the stored bytes; no unpacked copy outlives the product it was made for.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_megatron.layers.storage.product import Product, product_with


class Stored(nn.Module, ABC):
    """One frozen weight W [out, in] of this rank in some format.

    Args:
        out_features, in_features: the shape of this rank's part.
        axis: the axis it is cut along, 0 (column-parallel) or 1 (row-parallel).
        group: the tensor-parallel group, over which the inner dimension of one of the two products is cut.
    """

    def __init__(self, out_features: int, in_features: int, *, axis: int, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        assert axis in (0, 1)
        self.shape = (out_features, in_features)
        self.axis = axis
        self.group = group if group is not None and group.size() > 1 else None

    def _apply(self, fn: Any, recurse: bool = True) -> Stored:
        """Bytes and scales have the types of their format: `model.to(dtype)` is for parameters."""
        return self

    @abstractmethod
    def store(self, weight: Tensor) -> None:
        """Quantise `weight` [out, in]."""

    @abstractmethod
    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """W [out, in] as the format remembers it."""

    def forward_product(self, dtype: torch.dtype, bias: Tensor | None = None) -> Product:
        """x W^T + bias of rows x [m, in]: bias [out] -> [m, out]."""
        return product_with(self.unpacked(dtype).t(), bias)

    def backward_product(self, dtype: torch.dtype) -> Product:
        """grad W of rows grad [m, out] -> [m, in]."""
        return product_with(self.unpacked(dtype))

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias: [m, in], [out] -> [m, out]."""
        product = self.forward_product(x.dtype, bias)
        return product.of(*product.parts(x))

    def input_gradient(self, grad: Tensor) -> Tensor:
        """grad W: [m, out] -> [m, in]."""
        product = self.backward_product(grad.dtype)
        return product.of(*product.parts(grad))


def hand_over(layer: nn.Module, stored: Stored) -> None:
    """Replace `layer.weight` by its shape on the meta device, with `stored` for its bytes."""
    weight: Any = layer.weight
    handle = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device="meta"), requires_grad=False)
    handle.__dict__.update(weight.__dict__)  # the declarations
    handle.unpacked_device = weight.device  # type: ignore[attr-defined]  # travels like the declarations
    handle.stored = stored  # type: ignore[attr-defined]
    layer.weight = handle
    layer.stored = stored


@contextlib.contextmanager
def handle_put_aside(layer: nn.Module) -> Iterator[None]:
    """Within, a weight handed over is no parameter of `layer`: `model.to(device)` cannot move one without bytes."""
    handle = layer._parameters["weight"]
    if handle is not None and stored_of(handle) is not None:
        layer._parameters["weight"] = None
    try:
        yield
    finally:
        layer._parameters["weight"] = handle if layer._parameters["weight"] is None else layer._parameters["weight"]


def stored_of(parameter: Tensor) -> Stored | None:
    """Where the bytes of a weight are, None for one that holds them itself."""
    return getattr(parameter, "stored", None)


def device_of(parameter: Tensor) -> torch.device:
    """The device a parameter's values live on."""
    device: torch.device = getattr(parameter, "unpacked_device", parameter.device)
    return device


def store_beside(parameter: Tensor, stored: Stored) -> None:
    """Have `stored` hold whatever a loader writes into `parameter`, which keeps its own bytes for others to read."""
    parameter.stored_beside = stored  # type: ignore[attr-defined]  # travels like the declarations


@contextlib.contextmanager
def writable(parameter: Tensor) -> Iterator[Tensor]:
    """A tensor to fill with the parameter's values: itself, or a temporary that is stored at the end; what is kept
    beside a parameter is stored then too."""
    stored = stored_of(parameter)
    if stored is None:
        yield parameter
        if (beside := getattr(parameter, "stored_beside", None)) is not None:
            beside.store(parameter.detach())
        return
    values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device_of(parameter))
    yield values
    stored.store(values)

# SPDX-License-Identifier: Apache-2.0
"""The global norm of gradients, and their scaling by it: factor = min(1, most / (norm + 1e-6)), as megatron-core does.

What the passes leave are sums over all tokens that count. Their division by how many there are (`share`, the inverse)
is part of the factor: one pass over the gradients less. The norm is made on the device; a step whose host knows it
makes the factor in double there, one that is decided on the device with the same operations in double; both round it
once, to the gradients' float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lora_megatron.training.looked_up_once import counted_gradients

_EPSILON = 1e-6
"""megatron-core's."""


def chained(inner: Any) -> list[Any]:
    """The optimizers of which megatron-core's is made: one per model chunk; itself where it is one."""
    found: list[Any] = getattr(inner, "chained_optimizers", [inner])
    return found


def global_norm(optimizers: Sequence[Any]) -> Tensor:
    """Of all gradients of megatron-core's optimizers, as they are, fp64 [], on the device, for which nothing waits;
    collective.

    As megatron-core's own: replicas count once, and what ranks add up are squares in float32. Norms of all tensors are
    taken by one launch; without apex megatron-core takes them one by one and waits for each.
    """
    groups: dict[Any, list[Tensor]] = {}
    for optimizer in optimizers:
        groups.setdefault(optimizer.get_grad_stats_parallel_group(), []).extend(counted_gradients(optimizer))
    squares = []
    for group, gradients in groups.items():
        if gradients:
            square = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)).double()).float().square()
        else:
            square = torch.zeros((), device=torch.cuda.current_device())
        dist.all_reduce(square, group=group)
        squares.append(square)
    return torch.stack(squares).double().sum().sqrt()


def factor(norm: float, share: float, *, most: float) -> float:
    """By which sums are multiplied so that gradients, whose global norm is `norm`, have at most `most`; 0: any."""
    return share * min(1.0, most / (norm + _EPSILON)) if most > 0 else share


def factor_on_device(norm: Tensor, share: Tensor, *, most: float) -> Tensor:
    """As `factor`, by fp64 [] that the host does not know."""
    if most <= 0:
        return share
    # Tensor over tensor: a number over a tensor would be the number times a reciprocal, which rounds twice.
    return share * (torch.full_like(norm, most) / (norm + _EPSILON)).clamp(max=1.0)

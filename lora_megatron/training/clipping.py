# SPDX-License-Identifier: Apache-2.0
"""The global norm of gradients, and their scaling by it: factor = min(1, most / (norm + 1e-6)), as megatron-core does.

The norm is made on the device, for an eager step and for one in a CUDA graph by the same operations, so it is the same
to the bit. The eager step then knows the number and makes the factor in double on the host, the graph with the same
operations in double on the device; both round it once, to the gradients' float32.
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
    """Of all gradients of megatron-core's optimizers, fp64 [], on the device, for which nothing waits; collective.

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


def clip(gradients: list[Tensor], *, most: float, norm: float) -> None:
    """Scale the gradients in place so that a global norm above `most` becomes it."""
    factor = most / (norm + _EPSILON)
    if factor < 1 and gradients:
        torch._foreach_mul_(gradients, factor)


def clip_on_device(gradients: list[Tensor], *, most: float, norm: Tensor, is_finite: Tensor) -> None:
    """As `clip`, by a norm fp64 [] that the host does not know; by 1 where it is not finite (`is_finite`: bool [])."""
    # Tensor over tensor: a number over a tensor would be the number times a reciprocal, which rounds twice.
    factor = torch.full_like(norm, most) / (norm + _EPSILON)
    one = torch.ones_like(norm)
    torch._foreach_mul_(gradients, torch.where(is_finite, torch.minimum(factor, one), one).float())

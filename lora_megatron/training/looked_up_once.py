# SPDX-License-Identifier: Apache-2.0
"""What megatron-core's optimizer looks up for every parameter in every step, looked up once.

The update of a few numbers for each of some thousand factors is bound by the host: megatron-core walks over them time
and again in a step and, without apex, torch's AdamW computes the bias corrections of each on the host, while the GPU
has nothing else to do (`launch/results/2026-11-goals.md` has what that cost on H200s). Here

- AdamW is torch's fused one: one launch for some hundred factors, step counts on the device;
- of bf16 parameters with fp32 masters, the lists of gradients, masters and parameters are made in the first step. A
  master's gradient is DDP's own fp32 sum, which lies where it lies for as long as DDP does, so it is set once. Their
  step is `training.adamw_pass`.

megatron-core's distributed optimizer, which has shards of its own, has the fused AdamW and keeps its own lists. So does
one that steps fp32 parameters beside those of bf16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_NORM_GRADS = ("get_grads_for_grad_norm", "get_main_grads_for_grad_norm")
"""The name in megatron-core 0.19 and the one before it."""


def use_fused_adamw(optimizer: Any) -> None:
    """Of one of megatron-core's optimizers; apex's AdamW is fused anyway."""
    if isinstance(optimizer.optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        for group in optimizer.optimizer.param_groups:
            group.update(fused=True, foreach=False)


def is_fused_adamw(inner: Any) -> bool:
    """Of torch, which then counts its steps where the parameters lie."""
    return any(group.get("fused") for group in inner.param_groups)


def look_up_once(optimizer: Any) -> Lists | None:
    """Let one of megatron-core's optimizers of bf16 parameters keep its lists from its first step; None of others."""
    is_sharded = hasattr(optimizer, "shard_fp32_from_float16_groups")
    if hasattr(optimizer, "fp32_from_float16_groups") and not is_sharded and not any(optimizer.fp32_from_fp32_groups):
        return Lists(optimizer)
    return None


def counted_gradients(optimizer: Any) -> list[Tensor]:
    """The gradients of which the global norm is made on this rank: replicas on one rank alone."""
    found: list[Tensor] = _counting(optimizer)()
    return found


def _counting(optimizer: Any) -> Any:
    return getattr(optimizer, next(name for name in _NORM_GRADS if hasattr(optimizer, name)))


class Lists:
    """What an optimizer keeps; methods take the place of the optimizer's own of these names."""

    def __init__(self, optimizer: Any) -> None:
        self.adamw = optimizer.optimizer
        self._prepare, self._zero = optimizer._copy_model_grads_to_main_grads, optimizer.zero_grad
        self._count = _counting(optimizer)
        self._counted: list[Tensor] | None = None
        self.parameters = [p for group in optimizer.float16_groups for p in group]
        self.masters = [p for group in optimizer.fp32_from_float16_groups for p in group]
        """fp32, in the order of `parameters`."""
        optimizer._copy_model_grads_to_main_grads = self.prepare
        optimizer.zero_grad = self.zero_grad
        optimizer._copy_main_params_to_model_params = self.copy
        for name in _NORM_GRADS:
            if hasattr(optimizer, name):
                setattr(optimizer, name, self.counted)

    @property
    def is_steady(self) -> bool:
        """Whether each master's gradient is there to stay."""
        return self._counted is not None

    @property
    def gradients(self) -> list[Tensor]:
        """Of the masters that have one."""
        return [master.grad for master in self.masters if master.grad is not None]

    def prepare(self) -> None:
        if self.is_steady:
            return
        self._prepare()
        own = [*zip(self.parameters, self.masters, strict=True)]
        if all(m.grad is not None and m.grad is getattr(p, "main_grad", None) for p, m in own):
            self._counted = self._count()

    def zero_grad(self, set_to_none: bool = True) -> None:
        if not self.is_steady:
            self._zero(set_to_none)

    def counted(self, *group: Any) -> list[Tensor]:
        return self._count(*group) if group or self._counted is None else self._counted

    def copy(self) -> None:
        """From masters to parameters; megatron-core without apex takes two launches for each of them."""
        if self.masters:
            torch._foreach_copy_(self.parameters, self.masters)

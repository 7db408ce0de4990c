# SPDX-License-Identifier: Apache-2.0
"""`train.cuda_graph`: the optimizer's step as a CUDA graph beside that of the passes (`training.cuda_graph`).

For some hundred small factors the norm, clipping, AdamW and the copies into bf16 parameters are less work for a GPU
than for its host, which walks over them. A graph of them is one launch, after which the host reads the norm.

An eager step decides on the host, which knows the norm by then; a captured one on the device:

| decision                   | eager                           | captured                                              |
|----------------------------|---------------------------------|-------------------------------------------------------|
| a norm that is not finite  | the step ends                   | AdamW's `found_inf` is 1: masters, moments and counts |
|                            |                                 | stay, and parameters are the same masters, rounded    |
| whether to clip            | only by a factor below 1        | always, by min(1, factor)                             |
| learning rate              | a number of AdamW's group       | a float32 on the device, filled before each launch    |

Everything else of it lies in one place for the life of the optimizer: gradients in DDP's buffers, masters and
parameters, and the moments, into which a loaded state is copied. Results are the eager step's to the bit.

So is stepped what has fp32 masters of bf16 parameters, lists that are kept (`training.looked_up_once`) and torch's
fused AdamW. Other optimizers go on eagerly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_megatron.training.clipping import chained, clip_on_device, global_norm
from lora_megatron.training.cuda_graph import WARM_UP_STEPS, record
from lora_megatron.training.looked_up_once import Lists, is_fused_adamw


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    norm: Tensor
    """Of the last launch, fp64 []."""


class OptimizerGraph:
    """The graph of an optimizer's step. It needs a CUDA device once a step of it is due."""

    def __init__(self, inner: Any, lists: Sequence[Lists], *, clip_grad: float) -> None:
        self._inner = inner
        self._lists = lists
        self._clip_grad = clip_grad
        self._adamws = [each.adamw for each in lists]
        self._lr = torch.zeros((), device=torch.cuda.current_device())
        self._asked = 0
        self._captured: _Captured | None = None

    @classmethod
    def of(cls, inner: Any, lists: Sequence[Lists | None], *, clip_grad: float) -> OptimizerGraph | None:
        """Of one of megatron-core's optimizers and what each of those it is made of keeps; None: it goes on eagerly."""
        kept = [each for each in lists if each is not None and is_fused_adamw(each.adamw)]
        return cls(inner, kept, clip_grad=clip_grad) if kept and len(kept) == len(lists) else None

    def is_due(self) -> bool:
        """Whether the next step is a captured one; asked once before each. The first ones are not: they make AdamW's
        state and communicators, and find gradients where they will stay."""
        self._asked += 1
        return self._captured is not None or (self._asked > WARM_UP_STEPS and self._has_all())

    def step(self, lr: float) -> float:
        """As `MegatronAdamW.step`. `lr` must be a float32's value."""
        if self._captured is None:
            self._captured = _Captured(*record(self.run))
        self._lr.fill_(lr)  # both on the current stream, which has waited for the passes (`StepGraph.on_its_stream`)
        self._captured.graph.replay()
        return float(self._captured.norm)

    def run(self) -> Tensor:
        """What is captured: the step with the learning rate in its place. The global norm before clipping, fp64 []."""
        norm = global_norm(chained(self._inner))
        is_finite = norm.isfinite()
        if self._clip_grad > 0:
            gradients = [gradient for lists in self._lists for gradient in lists.gradients]
            clip_on_device(gradients, most=self._clip_grad, norm=norm, is_finite=is_finite)
        with _decided_on_device(self._adamws, lr=self._lr, found_inf=(~is_finite).float()):
            self._inner.step_with_ready_grads()
        return norm

    def release(self) -> None:
        """Give the graph's memory back; steps after this warm up again."""
        self._captured = None
        self._asked = 0

    def _has_all(self) -> bool:
        """Whether gradients and AdamW's state are there."""
        return all(lists.is_steady for lists in self._lists) and all(
            adamw.state.get(parameter)
            for adamw in self._adamws
            for g in adamw.param_groups
            for parameter in g["params"]
        )


@contextlib.contextmanager
def _decided_on_device(adamws: Sequence[Any], *, lr: Tensor, found_inf: Tensor) -> Iterator[None]:
    """Within, torch's AdamWs read `lr`, float32 [], and change nothing where `found_inf`, float32 [], is 1."""
    groups = [group for adamw in adamws for group in adamw.param_groups]
    before = [{key: group[key] for key in ("lr", "capturable")} for group in groups]
    for group in groups:
        group.update(lr=lr, capturable=True)  # the latter is what torch asks of whom a capture meets
    for adamw in adamws:
        adamw.found_inf = found_inf
    try:
        yield
    finally:
        for adamw in adamws:
            del adamw.found_inf
        for group, values in zip(groups, before, strict=True):
            group.update(values)

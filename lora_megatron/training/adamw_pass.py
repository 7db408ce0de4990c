# SPDX-License-Identifier: Apache-2.0
"""A step of AdamW that is decided on the device: nothing of it waits for the host, which reads the norm behind it.

For bf16 parameters with fp32 masters whose lists are kept (`training.looked_up_once`). On a GPU one kernel does all of
it (`training.adamw_kernels`), elsewhere torch's fused AdamW between two passes more; both by the same decisions:

| decision                   | how                                                                                |
|----------------------------|------------------------------------------------------------------------------------|
| the gradients' division    | by the tokens of the global batch, in the pass that clips them                     |
| a norm that is not finite  | masters, moments, counts and parameters stay                                       |
| clipping                   | always, by min(1, most / (norm + 1e-6)), in double                                 |
| learning rate              | a float32, bias corrections in double                                              |

So a step can lie in a CUDA graph (`training.optimizer_graph`), and is the same to the bit where it does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_megatron.training.clipping import chained, factor_on_device, global_norm
from lora_megatron.training.looked_up_once import Lists, is_fused_adamw

try:
    from lora_megatron.training import adamw_kernels as kernels
except ImportError:  # no Triton: by torch's AdamW
    kernels = None  # type: ignore[assignment]  # mypy takes the name for a module; None is what is asked for below

_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamWPass:
    """The step of an optimizer of megatron-core's."""

    def __init__(self, inner: Any, lists: Sequence[Lists], *, clip_grad: float) -> None:
        self._inner = inner
        self._lists = lists
        self._clip_grad = clip_grad
        self._adamws = [each.adamw for each in lists]
        group = self._adamws[0].param_groups[0]  # of all the same: `MegatronAdamW` sets them
        self._betas, self._eps, self._decay = group["betas"], group["eps"], group["weight_decay"]
        device = lists[0].masters[0].device
        self._lr = torch.zeros((), device=device)
        self._share = torch.zeros((), dtype=torch.float64, device=device)
        self._powers = torch.tensor(self._betas, dtype=torch.float64, device=device)
        self._table: kernels.Table | None = None
        self._counts: Tensor | None = None

    @classmethod
    def of(cls, inner: Any, lists: Sequence[Lists | None], *, clip_grad: float) -> AdamWPass | None:
        """Of one of megatron-core's optimizers and what each of those it is made of keeps; None: the host decides."""
        kept = [each for each in lists if each is not None and is_fused_adamw(each.adamw) and each.masters]
        return cls(inner, kept, clip_grad=clip_grad) if kept and len(kept) == len(lists) else None

    def is_ready(self) -> bool:
        """Whether each master's gradient is there to stay."""
        return all(lists.is_steady for lists in self._lists)

    def fill(self, lr: float, tokens: int) -> None:
        """What the next `run` reads. `lr` must be a float32's value."""
        self._lr.fill_(lr)
        self._share.fill_(1 / max(tokens, 1))

    def run(self) -> Tensor:
        """The global norm before clipping, of gradients that are divided, fp64 []."""
        if self._counts is None:
            self._bind()
        norm = global_norm(chained(self._inner)) * self._share
        is_finite = norm.isfinite()
        factor = factor_on_device(norm, self._share, most=self._clip_grad)
        if self._table is None:
            gradients = [gradient for lists in self._lists for gradient in lists.gradients]
            torch._foreach_mul_(gradients, factor.float())
            with _decided_on_device(self._adamws, lr=self._lr, found_inf=(~is_finite).float()):
                self._inner.step_with_ready_grads()
            return norm
        assert self._counts is not None
        bias = 1 - self._powers ** (self._counts[0].double() + 1)
        lr = self._lr.double()
        numbers = torch.stack([factor, lr / bias[0], bias[1].sqrt(), lr * self._decay, is_finite.double()]).float()
        kernels.step(self._table, numbers, betas=self._betas, eps=self._eps)
        self._counts += numbers[4]
        return norm

    def _bind(self) -> None:
        """Make AdamW's state where there is none, with all counts in one tensor, and the kernel's table."""
        every = [(adamw, p) for adamw in self._adamws for group in adamw.param_groups for p in group["params"]]
        self._counts = torch.zeros(len(every), device=self._lr.device)
        for (adamw, master), count in zip(every, self._counts, strict=True):
            state = adamw.state[master]
            if state:
                count.copy_(state["step"])
            else:
                state.update({kind: torch.zeros_like(master) for kind in _MOMENTS})
            state["step"] = count
        if kernels is None or not _is_for_kernels(self._lr.device):
            return
        stepped = []
        for lists in self._lists:
            for master, parameter in zip(lists.masters, lists.parameters, strict=True):
                state = lists.adamw.state[master]
                stepped.append(kernels.Stepped(master.grad, master, state["exp_avg"], state["exp_avg_sq"], parameter))
        self._table = kernels.table_of(stepped)


def _is_for_kernels(device: torch.device) -> bool:
    return device.type == "cuda"


@contextlib.contextmanager
def _decided_on_device(adamws: Sequence[Any], *, lr: Tensor, found_inf: Tensor) -> Iterator[None]:
    """Within, torch's AdamWs read `lr`, float32 [], and change nothing where `found_inf`, float32 [], is 1."""
    groups = [group for adamw in adamws for group in adamw.param_groups]
    before = [{key: group[key] for key in ("lr", "capturable")} for group in groups]
    is_captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    for group in groups:
        group.update(lr=lr, capturable=is_captured)  # torch asks for the latter then, and warns of it otherwise
    for adamw in adamws:
        adamw.found_inf = found_inf
    try:
        yield
    finally:
        for adamw in adamws:
            del adamw.found_inf
        for group, values in zip(groups, before, strict=True):
            group.update(values)

# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's ZeRO-1/2 optimizer behind a backward pass that megatron-core owns.

ZeRO (Rajbhandari et al. 2020): of N data-parallel ranks each keeps 1/N of the fp32 master weights and of Adam's two
moments, updates that part, and all-gathers the result. Per trainable parameter a rank holds 12/N bytes of them.

Who does what in a step:

    megatron-core DDP        sums the micro-batches' gradients into `param.main_grad` (fp32), unless a layer has done it
    finalize_model_grads     reduces main_grad over all ranks: a sum over the batch's tokens, equal on the DP ranks
    this file                norm of main_grad; hands DeepSpeed the slice of main_grad, divided, that this rank updates
    DeepSpeed                clips, steps AdamW on the slice, casts, all-gathers the parameters

DeepSpeed normally reduces gradients in hooks of its own; here they are never registered, so nothing is reduced twice.
As main_grad is megatron's buffer and stays whole on every rank, stage 2 saves no memory over stage 1 here: both shard
the optimizer state. For LoRA the gradients are as small as the adapters.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from lora_megatron.errors import CheckpointError, ConfigError

DTYPE_OF = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Fragment(NamedTuple):
    """Which elements of a parameter lie in this rank's partition, and where; both slices are empty if none do."""

    param: Any  # a Parameter; megatron-core adds the attribute main_grad
    in_param: slice
    in_partition: slice


class DeepSpeedZero:
    """AdamW whose state is sharded over the data-parallel ranks. `step` and the two state methods are collective.

    `params` are groups {"params": [...], "weight_decay": float}; a group without its own weight decay gets
    `weight_decay`. A pipeline stage that trains nothing passes no parameters and still joins the norm's reduction.
    The gradient norm sums over `model_parallel_group` (TP x PP; None for a single rank), leaving out the parameters
    for which `is_model_parallel_duplicate` says that another rank counts them. `clip_grad` 0 means no clipping.

    Raises ConfigError if DeepSpeed is not installed or `stage` is neither 1 nor 2.
    """

    def __init__(
        self,
        params: Sequence[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        clip_grad: float,
        stage: int,
        data_parallel_group: dist.ProcessGroup,
        model_parallel_group: dist.ProcessGroup | None,
        is_model_parallel_duplicate: Callable[[Parameter], bool],
        precision: str,
    ) -> None:
        if stage not in (1, 2):
            raise ConfigError(f"ZeRO stage {stage!r} is not supported: use 1 or 2")
        groups = [{"weight_decay": weight_decay, **group} for group in params if group["params"]]
        trainable = [param for group in groups for param in group["params"]]
        assert all(p.dtype == DTYPE_OF[precision] and p.requires_grad for p in trainable), f"not trained in {precision}"
        self.step_count = 0
        self._data_parallel_group = data_parallel_group
        self._model_parallel_group = model_parallel_group
        self._trainable = trainable
        self._counted_in_norm = [param for param in trainable if not is_model_parallel_duplicate(param)]
        self._device = trainable[0].device if trainable else _backend_device()
        # ZeRO replaces each group's list of parameters by its flat partition, so the lists are kept here.
        self._groups = [list(group["params"]) for group in groups]
        self._zero: Any = None
        zero_class, timers = _import_zero(self._device)  # also where nothing is trained: all ranks fail alike
        if trainable:
            adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=self._device.type == "cuda")
            self._zero = zero_class(
                adamw,
                param_names={param: str(index) for index, param in enumerate(trainable)},
                timers=timers,
                optimizer_params={},
                verbose=False,
                dp_process_group=data_parallel_group,
                clip_grad=clip_grad,
                gradient_accumulation_dtype=torch.float32,
                communication_data_type=torch.float32,
                partition_grads=stage == 2,
            )
            self._make_moments()
        self._fragments = [self._fragments_of(index) for index in range(len(self._groups))]

    def zero_grad(self) -> None:
        """Drop `.grad`; `main_grad` belongs to megatron's DDP, whose `zero_grad_buffer` clears it."""
        for param in self._trainable:
            param.grad = None

    def set_lr(self, lr: float) -> None:
        """Use this learning rate from the next step on, in every group."""
        if self._zero is not None:
            for group in self._zero.optimizer.param_groups:
                group["lr"] = lr

    @torch.no_grad()
    def step(self, tokens: int) -> float:
        """Update from `main_grad` over `tokens`, unless the norm of that is not finite (on all ranks alike); return it
        before clipping."""
        share = 1 / max(tokens, 1)
        norm = self._grad_norm() * share
        if not math.isfinite(norm_value := norm.item()):
            return norm_value
        if self._zero is not None:
            self._zero.reduced_grad_norm = norm
            for index, partition in enumerate(self._zero.single_partition_of_fp32_groups):
                gradient = torch.zeros_like(partition)
                for fragment in self._fragments[index]:
                    whole = fragment.param.main_grad.view(-1)
                    gradient[fragment.in_partition] = whole[fragment.in_param] * share
                self._zero.averaged_gradients[index] = [gradient]
            self._zero.step()
        self.step_count += 1
        return norm_value

    @torch.no_grad()
    def named_state(self, names: dict[Parameter, str]) -> Iterator[tuple[str, Tensor]]:
        """("<name>.<kind>", fp32 tensor of the parameter's shape) for master, exp_avg and exp_avg_sq, on every rank.

        The tensors share no memory. Turns gather, so all ranks go through to the end. `step_count` is apart.
        """
        for index, params in enumerate(self._groups):
            sizes = [param.numel() for param in params]
            for kind, partition in self._partitions(index).items():
                parts = [torch.empty_like(partition) for _ in range(dist.get_world_size(self._data_parallel_group))]
                dist.all_gather(parts, partition, group=self._data_parallel_group)
                pieces = torch.cat(parts)[: sum(sizes)].split(sizes)  # what follows is padding
                for param, piece in zip(params, pieces, strict=True):
                    yield f"{names[param]}.{kind}", piece.view(param.shape).clone()

    @torch.no_grad()
    def load_named_state(self, names: dict[Parameter, str], read: Callable[[str], Tensor], step: int) -> None:
        """Take over what `named_state` gave, at any data-parallel size, and refresh the parameters from the masters.

        Every rank reads every tensor, though it keeps only its part: a bad one then fails on all ranks alike instead
        of leaving the others waiting in the all-gather. Raises CheckpointError on a wrong shape or type.
        """
        for index, fragments in enumerate(self._fragments):
            for kind, partition in self._partitions(index).items():
                for param, in_param, in_partition in fragments:
                    name = f"{names[param]}.{kind}"
                    saved = read(name)
                    if saved.shape != param.shape or saved.dtype != torch.float32:
                        found, wanted = f"{saved.dtype} {list(saved.shape)}", f"torch.float32 {list(param.shape)}"
                        raise CheckpointError(f"optimizer state {name} is {found}, not {wanted}: load a matching one")
                    partition[in_partition] = saved.reshape(-1)[in_param].to(partition.device)
        if self._zero is not None:
            for moments in self._zero.optimizer.state.values():
                moments["step"].fill_(step)
            self._zero.update_lp_params()
        self.step_count = step

    @torch.no_grad()
    def refresh_master(self) -> None:
        """Take the fp32 masters from the parameters anew, after something else set those. Not collective."""
        for index, fragments in enumerate(self._fragments):
            master = self._partitions(index)["master"]
            for param, in_param, in_partition in fragments:
                master[in_partition] = param.view(-1)[in_param].float()

    def state_bytes(self) -> int:
        """Bytes of masters and moments on this rank."""
        partitions = [part for index in range(len(self._groups)) for part in self._partitions(index).values()]
        return sum(part.numel() * part.element_size() for part in partitions)

    def _grad_norm(self) -> Tensor:
        """L2 norm over all distinct parameters of the model, a scalar, equal on all ranks."""
        squares = [param.main_grad.float().square().sum() for param in self._counted_in_norm]
        total = torch.stack(squares).sum() if squares else torch.zeros((), device=self._device)
        if self._model_parallel_group is not None:
            dist.all_reduce(total, group=self._model_parallel_group)
        return total.sqrt()

    def _make_moments(self) -> None:
        """Allocate Adam's state now: it can be saved before the first step, and lack of memory shows at the start."""
        for master in self._zero.single_partition_of_fp32_groups:
            self._zero.optimizer.state[master] = {
                "step": torch.zeros((), device=self._device),  # the fused kernel wants it beside the moments
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }

    def _partitions(self, index: int) -> dict[str, Tensor]:
        """This rank's flat fp32 parts of group `index`, each [partition size]: views, so writing them is loading."""
        master = self._zero.single_partition_of_fp32_groups[index]
        moments = self._zero.optimizer.state[master]
        return {"master": master.detach(), "exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}

    def _fragments_of(self, index: int) -> list[Fragment]:
        """Where group `index`'s parameters, laid end to end, fall into this rank's partition of that line."""
        size = self._zero.single_partition_of_fp32_groups[index].numel()
        first = dist.get_rank(self._data_parallel_group) * size
        fragments, start = [], 0
        for param in self._groups[index]:
            begin = max(start, first)
            length = max(0, min(start + param.numel(), first + size) - begin)
            in_param = slice(begin - start, begin - start + length)
            fragments.append(Fragment(param, in_param, slice(begin - first, begin - first + length)))
            start += param.numel()
        return fragments


def _backend_device() -> torch.device:
    """The device whose tensors the backend moves, for a rank that trains nothing but joins the norm's reduction."""
    return torch.device("cuda" if "nccl" in dist.get_backend() else "cpu")


def _import_zero(device: torch.device) -> tuple[type, Any]:
    """DeepSpeed's optimizer class, made to take ready gradients, and a timer object for it. Needs torch.distributed.

    Imported on use: it takes seconds, and DeepSpeed is optional. Raises ConfigError with the remedy if it is missing.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed searches for an accelerator and warns
    try:
        import deepspeed
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
        from deepspeed.utils.timer import NoopTimer
    except ImportError as error:
        raise ConfigError(f"ZeRO needs DeepSpeed ({error}): pip install 'lora-megatron[deepspeed]'") from error
    if not deepspeed.comm.is_initialized():
        # On a CPU DeepSpeed would compile a shared-memory all-reduce with g++ here, which nothing below uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.comm.init_distributed(dist_backend=dist.get_backend(), verbose=False)

    class ReducedGradientsZero(DeepSpeedZeroOptimizer):
        """ZeRO for gradients that arrive reduced: no hooks in backward, and the norm is given, not computed."""

        reduced_grad_norm: Tensor

        def create_gradient_handling_hooks(self) -> None:
            """Megatron-core reduces: a second reduction would scale the gradient."""

        def check_overflow(self, partition_gradients: bool = True) -> None:
            self.overflow = False  # the caller looked at the norm, which is not finite if any gradient is not

        def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
            return self.reduced_grad_norm

    return ReducedGradientsZero, NoopTimer()

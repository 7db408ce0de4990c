# SPDX-License-Identifier: Apache-2.0
"""AdamW over the trained parameters only, with one interface for every way to shard its state.

| optimizer.sharding | state of the trained parameters                                             |
|--------------------|-----------------------------------------------------------------------------|
| none               | on every data-parallel rank                                                 |
| megatron           | 1/DP per rank, gradients reduce-scattered (megatron-core's distributed one) |
| deepspeed          | 1/DP per rank (DeepSpeed ZeRO over A and B)                                 |

Frozen parameters appear nowhere: no gradient buffer, no fp32 master copy, no moments.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor, nn

from lora_megatron.config import OptimizerSection
from lora_megatron.model.names import Named
from lora_megatron.training.adamw_pass import AdamWPass
from lora_megatron.training.clipping import chained, factor, global_norm
from lora_megatron.training.cuda_graph import StepGraph
from lora_megatron.training.looked_up_once import is_fused_adamw, look_up_once, use_fused_adamw
from lora_megatron.training.optimizer_graph import OptimizerGraph

STATE_KINDS = ("master", "exp_avg", "exp_avg_sq")


class Optimizer(Protocol):
    """What the loop asks of an optimizer."""

    def zero_grad(self) -> None:
        """Drop references to the last step's gradients (the buffers themselves are zeroed by the step)."""
        ...

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step."""
        ...

    def step(self, tokens: int) -> float:
        """Divide the gradients, which the passes leave as sums over the global batch's counted tokens, by `tokens`, how
        many those are; clip and update, unless the norm is not finite (then do nothing). The global norm before
        clipping. What the gradient buffers hold afterwards is not said.
        """
        ...

    def named_state(self, names: dict[nn.Parameter, str]) -> Iterator[tuple[str, Tensor]]:
        """(`<name>.<kind>`, fp32 tensor of this tensor rank's part, whole over data parallelism); collective."""
        ...

    def load_named_state(self, names: dict[nn.Parameter, str], read: Callable[[str], Tensor], step: int) -> None:
        """The inverse, also setting the parameters themselves; `read` answers this tensor rank's part."""
        ...

    def refresh_master(self) -> None:
        """Take the fp32 master copies from the parameters anew (after weights were loaded)."""
        ...

    def state_bytes(self) -> int:
        """Bytes of master copies and moments on this rank."""
        ...


def wrap_ddp(
    chunks: Sequence[GPTModel], *, sharding: str, precision: str, graph: StepGraph | None = None
) -> list[DistributedDataParallel]:
    """megatron-core's DDP over each chunk: gradient buffers (fp32) for the trained parameters only.

    `graph`: what will run their steps, where eager ones will not; gradients are summed on its stream.
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=sharding == "megatron",
        check_for_nan_in_grad=False,  # the guard in `step` sees the norm and speaks in one line
    )
    with contextlib.nullcontext() if graph is None else graph.on_its_stream():
        return [
            DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(chunks)
        ]


def gradient_bytes(ddp_chunks: Sequence[DistributedDataParallel]) -> int:
    """Bytes of the gradient buffers on this rank."""
    return sum(b.grad_data.numel() * b.grad_data.element_size() for ddp in ddp_chunks for b in ddp.buffers)


@dataclass
class _MainParameter:
    """The tensor the inner optimizer steps, and which flat range of the parameter it is (None: all of it)."""

    main: Tensor
    start: int = 0
    stop: int | None = None


class MegatronAdamW:
    """megatron-core's optimizer (plain or distributed), with its state readable by name.

    `graph`: what runs the passes. With it steps become a CUDA graph too, where they can.
    """

    def __init__(
        self,
        ddp_chunks: Sequence[DistributedDataParallel],
        section: OptimizerSection,
        *,
        precision: str,
        graph: StepGraph | None = None,
    ) -> None:
        self.chunks = list(ddp_chunks)
        self.clip_grad = section.clip_grad
        self.precision = precision
        config = OptimizerConfig(
            optimizer="adam",
            lr=section.lr,
            weight_decay=section.weight_decay,
            adam_beta1=section.betas[0],
            adam_beta2=section.betas[1],
            adam_eps=section.eps,
            clip_grad=section.clip_grad,
            bf16=precision == "bf16",
            params_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            use_distributed_optimizer=section.sharding == "megatron",
        )
        self.inner = get_megatron_optimizer(config, self.chunks, use_gloo_process_groups=False)
        for group in self.inner.param_groups:
            group["weight_decay"] = section.weight_decay  # one decay for all that trains
        self.set_lr(section.lr)
        for optimizer in self._optimizers():
            use_fused_adamw(optimizer)
        kept = [look_up_once(optimizer) for optimizer in self._optimizers()]
        self._pass = AdamWPass.of(self.inner, kept, clip_grad=self.clip_grad)
        self._graph = None if graph is None or self._pass is None else OptimizerGraph(self._pass)
        if graph is not None and self._graph is not None:
            graph.release_too(self._graph.release)
        self._state_bytes = 0

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    def set_lr(self, lr: float) -> None:
        # A float32: torch's AdamW reads nothing longer from the device, where a CUDA graph has it. Both shall be one.
        self._lr = torch.tensor(lr, dtype=torch.float32).item()
        for group in self.inner.param_groups:
            group["lr"] = self._lr

    @torch.no_grad()
    def step(self, tokens: int) -> float:
        self.inner.prepare_grads()
        if self._pass is not None and self._pass.is_ready():
            self._pass.fill(self._lr, tokens)
            return float((self._graph or self._pass).run())
        share = 1 / max(tokens, 1)
        norm = float(global_norm(chained(self.inner))) * share
        # megatron-core as a library applies NaN gradients and reports success, so the check is here.
        if not math.isfinite(norm):
            return norm
        for optimizer in self._optimizers():
            gradients = [p.grad for p in optimizer.get_parameters() if p.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, factor(norm, share, most=self.clip_grad))
        self.inner.step_with_ready_grads()
        return norm

    def _optimizers(self) -> list[Any]:
        return [o for o in chained(self.inner) if not getattr(o, "is_stub_optimizer", False)]

    def _main_parameters(self) -> dict[nn.Parameter, _MainParameter]:
        """Trained parameter -> what is stepped for it on this rank; absent where another data-parallel rank owns it."""
        mains: dict[nn.Parameter, _MainParameter] = {}
        for optimizer in self._optimizers():
            if hasattr(optimizer, "shard_fp32_from_float16_groups"):  # distributed
                pairs = [
                    *zip(optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups, strict=True),
                    *zip(optimizer.model_fp32_groups, optimizer.shard_fp32_groups, strict=True),
                ]
                for models, shards in pairs:
                    for model, shard in zip(models, shards, strict=True):
                        owned = optimizer._get_model_param_range_map(model)["param"]
                        mains[model] = _MainParameter(shard, owned.start, owned.end)
            elif hasattr(optimizer, "fp32_from_float16_groups"):  # bf16 with fp32 masters
                for models, shards in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True):
                    mains.update({m: _MainParameter(s) for m, s in zip(models, shards, strict=True)})
            else:
                mains.update({p: _MainParameter(p) for p in optimizer.get_parameters()})
        return mains

    @torch.no_grad()
    def named_state(self, names: dict[nn.Parameter, str]) -> Iterator[tuple[str, Tensor]]:
        mains = self._main_parameters()
        sharded = self.chunks[0].ddp_config.use_distributed_optimizer
        for parameter, name in names.items():
            owned = mains.get(parameter)
            for kind in STATE_KINDS:
                yield f"{name}.{kind}", self._whole(parameter, owned, kind, sharded=sharded)

    def _whole(self, parameter: nn.Parameter, owned: _MainParameter | None, kind: str, *, sharded: bool) -> Tensor:
        whole = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        if owned is not None:
            value = owned.main if kind == "master" else self._moment(owned.main, kind)
            if value is not None:
                whole.view(-1)[owned.start : owned.stop].copy_(value.reshape(-1))
        if sharded:  # every rank contributes its range; the ranges do not overlap, so the sum is exact
            dist.all_reduce(whole, group=mpu.get_data_parallel_group(with_context_parallel=True))
        return whole

    def _moment(self, main: Tensor, kind: str) -> Tensor | None:
        for optimizer in self._optimizers():
            state = optimizer.optimizer.state
            if main in state:
                moment: Tensor | None = state[main].get(kind)
                return moment
        return None

    @torch.no_grad()
    def load_named_state(self, names: dict[nn.Parameter, str], read: Callable[[str], Tensor], step: int) -> None:
        mains = self._main_parameters()
        inner_state = {
            p: o.optimizer for o in self._optimizers() for g in o.optimizer.param_groups for p in g["params"]
        }
        for parameter, name in names.items():
            values = {kind: read(f"{name}.{kind}") for kind in STATE_KINDS}
            parameter.copy_(values["master"])
            owned = mains.get(parameter)
            if owned is None:
                continue
            ranged = {k: v.to(parameter.device).reshape(-1)[owned.start : owned.stop] for k, v in values.items()}
            if owned.main is not parameter:
                owned.main.copy_(ranged["master"].view_as(owned.main))
            inner = inner_state[owned.main]
            count = torch.tensor(float(step), device=owned.main.device if is_fused_adamw(inner) else None)
            state = inner.state[owned.main]
            for kind, value in {"step": count, **{k: ranged[k].view_as(owned.main) for k in STATE_KINDS[1:]}}.items():
                if kind in state:
                    state[kind].copy_(value)  # in its place, where a CUDA graph goes on finding it
                else:
                    state[kind] = value.clone()
        for group in self.inner.param_groups:
            if "step" in group or type(self).fused(self.inner):
                group["step"] = step  # fused optimizers count steps per group

    @staticmethod
    def fused(inner: Any) -> bool:
        """Whether apex's or Transformer Engine's FusedAdam is the inner optimizer."""
        return any(type(o.optimizer).__name__ == "FusedAdam" for o in chained(inner))

    def refresh_master(self) -> None:
        self.inner.reload_model_params()

    def state_bytes(self) -> int:
        if not self._state_bytes and any(optimizer.optimizer.state for optimizer in self._optimizers()):
            self._state_bytes = self._count_state()  # from now on the same, and asked for in every step
        return self._state_bytes or self._count_state()

    def _count_state(self) -> int:
        total = 0
        for parameter, owned in self._main_parameters().items():
            if self.precision == "bf16" and owned.main is not parameter:
                total += owned.main.numel() * owned.main.element_size()
            for kind in STATE_KINDS[1:]:
                moment = self._moment(owned.main, kind)
                total += 0 if moment is None else moment.numel() * moment.element_size()
        return total


def trained(named: Sequence[Named]) -> dict[nn.Parameter, str]:
    """The trained parameters and their global names, in a fixed order; copies of a tied embedding included."""
    return {n.parameter: n.name for n in named if n.parameter.requires_grad}

# SPDX-License-Identifier: Apache-2.0
"""From `optimizer.sharding` to an optimizer."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch import nn

from lora_megatron.config import OptimizerSection
from lora_megatron.training.cuda_graph import StepGraph
from lora_megatron.training.deepspeed_zero import DeepSpeedZero
from lora_megatron.training.optimizer import MegatronAdamW, Optimizer


def choose_optimizer(
    ddp_chunks: Sequence[DistributedDataParallel],
    section: OptimizerSection,
    *,
    precision: str,
    graph: StepGraph | None = None,
) -> Optimizer:
    """AdamW over the trained parameters of these chunks, its state sharded as the section says.

    `graph`: what runs the passes, given to `wrap_ddp` too.

    Raises:
        ConfigError: `deepspeed` is asked for and not installed.
    """
    if section.sharding != "deepspeed":
        return MegatronAdamW(ddp_chunks, section, precision=precision, graph=graph)
    trained = [p for chunk in ddp_chunks for p in chunk.parameters() if p.requires_grad]
    return DeepSpeedZero(
        [{"params": trained}],
        lr=section.lr,
        betas=section.betas,
        eps=section.eps,
        weight_decay=section.weight_decay,
        clip_grad=section.clip_grad,
        stage=2,
        data_parallel_group=mpu.get_data_parallel_group(with_context_parallel=True),
        model_parallel_group=mpu.get_model_parallel_group(),
        is_model_parallel_duplicate=_counted_elsewhere,
        precision=precision,
    )


def _counted_elsewhere(parameter: nn.Parameter) -> bool:
    """Replicated parameters count on tensor rank 0, the second copy of a tied embedding not at all."""
    return getattr(parameter, "shared", False) or not param_is_not_tensor_parallel_duplicate(parameter)

# SPDX-License-Identifier: Apache-2.0
"""From `optimizer.sharding` to an optimizer."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.distributed import DistributedDataParallel

from lora_megatron.config import OptimizerSection
from lora_megatron.training.optimizer import MegatronAdamW, Optimizer


def choose_optimizer(
    ddp_chunks: Sequence[DistributedDataParallel], section: OptimizerSection, *, precision: str
) -> Optimizer:
    """AdamW over the trained parameters of these chunks, its state sharded as the section says."""
    return MegatronAdamW(ddp_chunks, section, precision=precision)

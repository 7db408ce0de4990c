# SPDX-License-Identifier: Apache-2.0
"""Gradients of replicated parameters that under sequence parallelism each tensor rank has of its own tokens only.

Summed over the tensor-parallel group where they lie, in one collective of all of them. megatron-core puts them
together, and back by one launch for each parameter: with adapters on all linear layers six in every layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from lora_megatron.layers.sharding import is_summed_over_sequence_shards

_MEGATRONS = ("q_layernorm", "k_layernorm")
"""Norms over heads, whose gradients megatron-core sums by their names."""


def sum_over_sequence_shards(chunks: Sequence[DistributedDataParallel]) -> None:
    """In place, over this rank's tensor-parallel group; nothing without sequence parallelism."""
    gradients = [gradient for chunk in chunks for gradient in _partial(chunk)]
    if not gradients:
        return
    group = mpu.get_tensor_model_parallel_group()
    with dist._coalescing_manager(group):  # as megatron-core's DDP reduces its buckets
        for gradient in gradients:
            dist.all_reduce(gradient, group=group)


def _partial(chunk: DistributedDataParallel) -> Iterator[Tensor]:
    for name, parameter in chunk.named_parameters():
        is_megatrons = chunk.config.qk_layernorm and any(norm in name for norm in _MEGATRONS)
        if parameter.requires_grad and is_summed_over_sequence_shards(parameter) and not is_megatrons:
            gradient: Tensor = parameter.main_grad  # DDP's, fp32
            yield gradient

# SPDX-License-Identifier: Apache-2.0
"""Random base weights that are a function of (seed, name) alone, and so the same under every layout.

GPT-2's scheme: normal(0, 0.02), and normal(0, 0.02 / sqrt(2 L)) for the two projections that write into the residual
stream; norms at one, biases at zero. Each full tensor is drawn on the training device and cut to this rank's part,
one tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from megatron.core import parallel_state as mpu
from torch import Tensor, nn

from lora_megatron.layers.lora import seed_from
from lora_megatron.layers.sharding import shard_of
from lora_megatron.layers.storage.stored import writable
from lora_megatron.model.names import named_parameters
from lora_megatron.parallel.heartbeat import beat

_RESIDUAL_WRITERS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")


def initialise_base(chunks: Sequence[nn.Module], *, seed: int, num_layers: int) -> None:
    """Fill every base parameter of this rank's chunks; adapters keep the values they were born with."""
    rank, size = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
    with torch.no_grad():
        for named in named_parameters(chunks):
            if ".adapters." in named.name:
                continue
            shard = shard_of(named.parameter)
            shape = shard.full_shape(named.parameter.shape, size)
            with writable(named.parameter) as target:
                full = _draw(named.name, shape, seed, num_layers, target)
                target.copy_(shard.part(full, shape, rank, size))
            beat()


def _draw(name: str, shape: tuple[int, ...], seed: int, num_layers: int, like: Tensor) -> Tensor:
    if name.endswith(".bias"):
        return torch.zeros(shape, device=like.device, dtype=like.dtype)
    if len(shape) == 1:
        return torch.ones(shape, device=like.device, dtype=like.dtype)
    std = 0.02 / math.sqrt(2 * num_layers) if name.endswith(_RESIDUAL_WRITERS) else 0.02
    generator = torch.Generator(like.device).manual_seed(seed_from(seed, name))
    return torch.empty(shape, device=like.device, dtype=torch.float32).normal_(0.0, std, generator=generator)

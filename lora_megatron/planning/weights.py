# SPDX-License-Identifier: Apache-2.0
"""Bytes of weights, gradients and optimizer state of one rank, read off its model as it was built.

| what           | bytes                                                                                          |
|----------------|------------------------------------------------------------------------------------------------|
| frozen weights | 2 or 4 each in bf16 or fp32; fp8 and nf4 for linear weights as `STORAGE` says; with `base.head` |
|                | fp8 the output layer's likewise, beside the table in which tokens are looked up                |
| trained        | 2 or 4 each                                                                                    |
| gradients      | megatron-core's DDP buffers: 4 each, trained parameters only                                   |
| optimizer      | two fp32 moments, 8 each; in bf16 an fp32 master copy too, 12                                  |

With `optimizer.sharding` megatron, buffers are padded (a parameter starts at a multiple of 64 elements, a bucket ends
at one of 128 and of the data-parallel size), the trained weights live in such a buffer too, and the optimizer state is
that of this rank's range. With deepspeed the trained weights are one flat tensor padded to 2 x DP elements, of which
this rank keeps 1 / DP as master copy and moments, 12 each also in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lora_megatron.config import BaseSection
from lora_megatron.layers.sharding import shard_of
from lora_megatron.layers.storage.choose import StorageFormat
from lora_megatron.model.names import EMBEDDING, named_parameters

STORAGE = {
    "fp8": "e4m3, one byte a weight, and an fp32 scale for each row or column",
    "nf4": "half a byte a weight; a one-byte scale for each 64 of them; for each 256 scales two fp32 numbers",
}
"""How frozen linear weights are kept where not in `train.precision`; embeddings, norms and biases stay in that."""

_LINEARS = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
_ROW_PARALLEL = ("linear_proj.weight", "linear_fc2.weight")
_PARAMETER_START, _BUCKET_END = 64, 128  # elements; megatron-core's alignment of distributed-optimizer buffers
_ZERO_ALIGNMENT = 2  # elements per data-parallel rank; DeepSpeed's


@dataclass(frozen=True)
class Weight:
    """A parameter (or buffer) of this rank."""

    name: str
    """Global: the same parameter under every layout."""
    shape: tuple[int, ...]
    itemsize: int
    """Bytes per element in train.precision."""
    trained: bool
    chunk: int = 0
    is_copy: bool = False
    """The second copy of a tied embedding, on the last pipeline stage."""
    own_bucket: bool = False
    """megatron-core gives a shared embedding a gradient bucket of its own."""
    full_shape: tuple[int, ...] | None = None
    """Of the true, unsharded parameter; None for a buffer."""
    is_head: bool = False
    """Whether the output layer multiplies with it: its own, the copy of a tied embedding, or the table itself."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def full_size(self) -> int:
        """Elements of the true parameter; 0 for a buffer."""
        return 0 if self.full_shape is None else math.prod(self.full_shape)

    @property
    def is_linear(self) -> bool:
        """Whether it may be kept in fp8 or nf4."""
        return self.name.endswith(_LINEARS)

    @property
    def is_adapter(self) -> bool:
        return ".adapters." in self.name


def weights_of(chunks: Sequence[nn.Module], *, tensor_size: int) -> list[Weight]:
    """Every parameter and buffer of bare GPTModels, in the order megatron-core's DDP sees them."""
    found = []
    for index, chunk in enumerate(chunks):
        head = _head_of(chunk)
        for named in named_parameters([chunk]):
            parameter = named.parameter
            found.append(
                Weight(
                    named.name,
                    tuple(parameter.shape),
                    parameter.element_size(),
                    parameter.requires_grad,
                    index,
                    named.is_copy,
                    bool(getattr(parameter, "shared_embedding", False)),
                    shard_of(parameter).full_shape(parameter.shape, tensor_size),
                    parameter is head,
                )
            )
        buffers = chunk.named_buffers()
        found += [Weight(name, tuple(b.shape), b.element_size(), False, index) for name, b in buffers]
    return found


def _head_of(chunk: Any) -> nn.Parameter | None:
    """What the output layer of a GPTModel multiplies with; None without one."""
    if not chunk.post_process:
        return None
    is_tied = chunk.share_embeddings_and_output_weights
    weight: nn.Parameter = chunk.shared_embedding_or_output_weight() if is_tied else chunk.output_layer.weight
    return weight


def as_fully_trained(weights: Sequence[Weight]) -> list[Weight]:
    """The same model without adapters and with every parameter trained: full fine-tuning."""
    return [replace(weight, trained=weight.full_shape is not None) for weight in weights if not weight.is_adapter]


def frozen_bytes(weights: Sequence[Weight], base: BaseSection) -> int:
    """Bytes of what does not train; where `base` names no format it is as built."""
    return sum(_frozen_bytes(weight, base) for weight in weights if not weight.trained)


def _frozen_bytes(weight: Weight, base: BaseSection) -> int:
    as_built = weight.size * weight.itemsize
    if weight.is_linear and base.storage in STORAGE:
        return _stored_bytes(weight, base.storage)
    if weight.is_head and base.head in STORAGE:
        looked_up = weight.name == EMBEDDING and not weight.is_copy
        return _stored_bytes(weight, base.head) + (as_built if looked_up else 0)
    return as_built


def _stored_bytes(weight: Weight, storage: str) -> int:
    rows, columns = weight.shape
    axis = int(weight.name.endswith(_ROW_PARALLEL))
    stored = StorageFormat(storage).make(rows, columns, device=torch.device("meta"), axis=axis, group=None)
    return sum(buffer.numel() * buffer.element_size() for buffer in stored.buffers())


def turned_head_bytes(weights: Sequence[Weight], base: BaseSection) -> int:
    """The output layer's FP8 codes that are kept turned round, from the first gradient on (`base.head`)."""
    return sum(weight.size for weight in weights if weight.is_head and not weight.trained and base.head == "fp8")


@dataclass(frozen=True)
class _Buffer:
    """A gradient buffer: its elements with padding, and where buckets and parameters begin and end."""

    size: int
    buckets: tuple[tuple[int, int], ...]
    parameters: tuple[tuple[int, int], ...]


def _buffer(trained: Sequence[Weight], *, distributed: bool, data_size: int) -> _Buffer:
    """megatron-core's buffer over one chunk's trained parameters, which stand in it last to first."""
    bucket_multiple = math.lcm(data_size, _BUCKET_END) if distributed else 1
    position = bucket_start = 0
    buckets: list[tuple[int, int]] = []
    parameters: list[tuple[int, int]] = []

    def end_bucket() -> int:
        nonlocal bucket_start
        end = _round_up(position, bucket_multiple)
        buckets.append((bucket_start, end))
        bucket_start = end
        return end

    is_open = False
    for weight in reversed(trained):
        position = _round_up(position, _PARAMETER_START if distributed else 1)
        alone = distributed and weight.own_bucket
        if alone and is_open:
            position = end_bucket()
        parameters.append((position, position + weight.size))
        position += weight.size
        is_open = not alone
        if alone:
            position = end_bucket()
    if is_open:
        position = end_bucket()
    return _Buffer(position, tuple(buckets), tuple(parameters))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class TrainedBytes:
    """Bytes of what trains, on one rank."""

    weights: int
    gradients: int
    optimizer: int


def trained_bytes(
    weights: Sequence[Weight], *, sharding: str, precision: str, data_size: int, data_rank: int
) -> TrainedBytes:
    """Trained weights, gradient buffers and optimizer state of data-parallel rank `data_rank` of `data_size`."""
    by_chunk = [[w for w in weights if w.trained and w.chunk == c] for c in {w.chunk: None for w in weights}]
    distributed = sharding == "megatron"
    buffers = [_buffer(trained, distributed=distributed, data_size=data_size) for trained in by_chunk]
    gradients = 4 * sum(buffer.size for buffer in buffers)
    itemsize = max((weight.itemsize for weight in weights), default=4)
    count = sum(weight.size for trained in by_chunk for weight in trained)
    per_element = 12 if precision == "bf16" else 8
    if sharding == "deepspeed":
        flat = _round_up(count, _ZERO_ALIGNMENT * data_size)
        return TrainedBytes(flat * itemsize, gradients, 12 * flat // data_size)
    if distributed:
        owned = sum(_owned(buffer, data_rank, data_size) for buffer in buffers)
        return TrainedBytes(sum(buffer.size for buffer in buffers) * itemsize, gradients, per_element * owned)
    return TrainedBytes(count * itemsize, gradients, per_element * count)


def _owned(buffer: _Buffer, data_rank: int, data_size: int) -> int:
    """Elements of parameters in this rank's range of every bucket."""
    owned = 0
    for start, end in buffer.buckets:
        share = (end - start) // data_size
        first, last = start + data_rank * share, start + (data_rank + 1) * share
        owned += sum(max(0, min(last, stop) - max(first, begin)) for begin, stop in buffer.parameters)
    return owned

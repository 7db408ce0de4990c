# SPDX-License-Identifier: Apache-2.0
"""The memory of one rank by kind: exact for what exists all the time, a stated model for what comes and goes.

Weights, gradients and optimizer state are read off the rank's real model, built on the meta device (`weights`).
Activations and the loss are those of `activations` at the worst moment of the pipeline schedule (`schedule`). On top
come, on a GPU, tensors that live for the time of one operation; `_workspace` says which. Outside torch's allocator are
CUDA's context and the communicators' own buffers, which only constants can stand for, and the boxes of
`parallel.tp_comm_overlap` (`layers.exchange`) and `parallel.pp_comm_copy` (`parallel.stage_copies`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron.core import parallel_state as mpu

from lora_megatron.config import BaseSection, Config
from lora_megatron.layers.exchange import bytes_of
from lora_megatron.layers.mlp_adapter_tiles import addend_bytes
from lora_megatron.layers.vocabulary_loss import tokens_per_chunk
from lora_megatron.methods.method import Method
from lora_megatron.model.build import build
from lora_megatron.model.checks import layout_of, options_of
from lora_megatron.model.recomputation import NOTHING_RECOMPUTED
from lora_megatron.model.shape import ModelShape
from lora_megatron.parallel import stage_copies
from lora_megatron.parallel.sent_outputs import UNDER_WAY
from lora_megatron.planning.activations import ChunkBytes, Microbatch
from lora_megatron.planning.gradients import LayerFlow, layer_flow
from lora_megatron.planning.schedule import peak
from lora_megatron.planning.stages import chunks_of, microbatch_of, names_read_backward, stage_layers
from lora_megatron.planning.transposes import host_bytes, unpacked_bytes
from lora_megatron.planning.weights import Weight, frozen_bytes, trained_bytes, turned_head_bytes, weights_of

MIB = 2**20
CUDA_CONTEXT = 512 * MIB
"""Of one process on a recent data-centre GPU: driver context, kernels of torch and cuBLAS."""
COMMUNICATOR = 64 * MIB
"""NCCL's own buffers for one process group of more than one rank."""
CUBLAS_WORKSPACE = 32 * MIB
"""What torch lends cuBLAS on Hopper, for each thread that multiplies: forward and autograd."""
ADAMW_TEMPORARY = 4
"""Bytes per element this rank steps, at most: DeepSpeed's step has a copy of its slice of the gradients; torch's fused
AdamW and the kernel of `training.adamw_pass` take nothing."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank, by kind."""

    frozen_weights: int
    trained_weights: int
    gradients: int
    optimizer: int
    activations: int
    """Kept for backward passes at the worst moment, without the loss."""
    logits: int
    """Kept for the loss: its gradient to the hidden states, or the logits where the output weight trains."""
    communication: int
    """Tensors of pipeline neighbours in flight, and sequence shards gathered."""
    workspace: int
    """Tensors that live for one operation: products and their gradients, a chunk of logits, an unpacked weight; and FP8
    weights that are kept turned round. With `train.cuda_graph` also those of the optimizer's step, and the inputs of
    all microbatches."""
    context: int
    """Outside torch's allocator: CUDA's context, NCCL's buffers and those of `parallel.tp_comm_overlap` and
    `pp_comm_copy`."""

    @property
    def weights(self) -> int:
        """What `measure.memory` calls weights: frozen and trained."""
        return self.frozen_weights + self.trained_weights

    @property
    def persistent(self) -> int:
        """Held from the first step to the last."""
        return self.weights + self.gradients + self.optimizer

    @property
    def allocated(self) -> int:
        """What torch's allocator should report as its peak."""
        return self.persistent + self.activations + self.logits + self.communication + self.workspace

    @property
    def total(self) -> int:
        """What the GPU must have."""
        return self.allocated + self.context


@dataclass(frozen=True)
class Place:
    """Which rank of a job: everything of its position that changes bytes."""

    stage: int
    data_rank: int
    data_size: int


def plan_this_rank(config: Config, shape: ModelShape, method: Method) -> MemoryPlan:
    """The plan of the rank this process is, in the world it is in: a real one or `parallel.fake_world`'s.

    megatron-core's groups must stand (`groups.build_mesh`). The model is built on the meta device: no memory, no
    collective. `config` must have passed `model.checks`.
    """
    return plan_rank(config, shape, method, build_rank(config, shape, method), this_place())


def locked_by_this_rank(config: Config, shape: ModelShape, method: Method) -> int:
    """Bytes of the host's memory that this rank locks (`base.transposes` host); needs what `plan_this_rank` needs."""
    names = names_read_backward(method, microbatch_of(config, shape), this_place().stage)
    return host_bytes(build_rank(config, shape, method), config.base, read_backward=names)


def this_place() -> Place:
    """The place of the rank this process is."""
    return Place(
        mpu.get_pipeline_model_parallel_rank(), mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    )


def build_rank(config: Config, shape: ModelShape, method: Method) -> list[Weight]:
    """The parameters of this process's rank, from its real model on the meta device."""
    layout = layout_of(config)
    # The sizes of stored weights are in `weights`, and recomputation changes none.
    options = replace(options_of(config, meta=True), storage=None, head=None, **NOTHING_RECOMPUTED)
    return weights_of(build(shape, method, layout, options), tensor_size=layout.tensor)


def plan_rank(config: Config, shape: ModelShape, method: Method, weights: Sequence[Weight], place: Place) -> MemoryPlan:
    """The plan of a rank that holds `weights` and stands at `place`."""
    batch = microbatch_of(config, shape)
    chunks = chunks_of(shape, method, batch, place.stage)
    data, layout = config.data, batch.layout
    count = data.global_batch_size // (data.micro_batch_size * place.data_size)
    trained = trained_bytes(
        weights,
        sharding=config.optimizer.sharding,
        precision=config.train.precision,
        data_size=place.data_size,
        data_rank=place.data_rank,
    )
    worst = peak(place.stage, layout.pipeline, chunks, count)
    stepping = trained.optimizer // (12 if config.train.precision == "bf16" else 8) * ADAMW_TEMPORARY
    unpacked = unpacked_bytes(weights, config.base, read_backward=names_read_backward(method, batch, place.stage))
    addends = _addends(method, batch, place)
    in_backward = _workspace(batch, chunks, weights, config.base, addends=addends, unpacked=unpacked)
    at_most = max(in_backward, stepping - worst.bytes)
    if config.train.cuda_graph:  # what the passes had stays the graph's while the optimizer steps; one stream is aside
        at_most = in_backward + stepping + count * _inputs(config, batch) + CUBLAS_WORKSPACE
    return MemoryPlan(
        frozen_weights=frozen_bytes(weights, config.base),
        trained_weights=trained.weights,
        gradients=trained.gradients,
        optimizer=trained.optimizer,
        activations=round(worst.activations + sum(chunk.once for chunk in chunks)),
        logits=round(worst.loss),
        communication=round(_communication(batch, copies=config.parallel.pp_comm_copy)),
        workspace=round(at_most),
        context=_outside(config, method, batch, place),
    )


def _inputs(config: Config, batch: Microbatch) -> int:
    """A microbatch on the GPU: tokens, labels and positions in int64, the loss mask in fp32, a mask of attention."""
    return batch.tokens * (3 * 8 + 4 + (config.data.sequence_length if config.data.packing else 0))


def _outside(config: Config, method: Method, batch: Microbatch, place: Place) -> int:
    """What torch's allocator does not know of."""
    layout = batch.layout
    communicators = sum(n > 1 for n in (layout.tensor, layout.pipeline, place.data_size))
    boxes = 0
    if config.parallel.tp_comm_overlap:
        own = batch.tokens // layout.tensor
        beside = max(linear.rank for flow in _stage_flows(method, batch, place) for linear in flow.linears)
        boxes = bytes_of(own, batch.shape.hidden_size, layout.tensor, batch.itemsize, beside=beside)
    if config.parallel.pp_comm_copy:
        boxes += stage_copies.bytes_of(round(batch.hidden_bytes))
    return CUDA_CONTEXT + COMMUNICATOR * communicators + boxes


def _stage_flows(method: Method, batch: Microbatch, place: Place) -> Iterator[LayerFlow]:
    """Of all layers of a stage."""
    for layers in stage_layers(batch, place.stage):
        yield from (layer_flow(batch.shape, method, layer, input_needs=True) for layer in layers)


def _addends(method: Method, batch: Microbatch, place: Place) -> int:
    """Of the gradients of an MLP's factors, where its adapters are inside the activation's passes."""
    gated, columns = batch.shape.gated_mlp, batch.shape.ffn_hidden_size // batch.tensor
    mlps = ((flow.fc1, flow.fc2) for flow in _stage_flows(method, batch, place) if flow.mlp_is_frozen)
    sizes = (
        addend_bytes(
            [adapter.rank for adapter in fc1.adapters],
            fc2.rank,
            batch.tokens,
            columns,
            gated=gated,
            itemsize=batch.itemsize,
        )
        for fc1, fc2 in mlps
    )
    return max(sizes, default=0)


def _workspace(
    batch: Microbatch,
    chunks: Sequence[ChunkBytes],
    weights: Sequence[Weight],
    base: BaseSection,
    *,
    addends: int,
    unpacked: int,
) -> float:
    """Bytes on top of what is kept, at the worst moment of forward and backward.

    Either at the loss: one chunk of logits in train.precision, and in fp32, as without the loss's kernels; its part of
    the hidden states' gradient; with `base.head` fp8 the codes of its gradient, or the labels' rows in fp32.
    Or in a layer's MLP, by when the loss is gone: the gradients of fc1's output and of fc2's input, and a hidden
    state; `addends` of its factors' gradients; and fc1's output itself, where it is made again and nothing has gone
    yet that made room for it.
    Full fine-tuning adds the gradient of one weight in train.precision, stored weights what their products read
    (`unpacked`), an output layer in FP8 its codes turned round, for good.
    """
    e, shape = batch.itemsize, batch.shape
    loss = max(chunk.loss for chunk in chunks)
    chunk = tokens_per_chunk(batch.tokens, batch.vocabulary)
    in_fp32 = 4 if e < 4 else 0  # logits in fp32 turn into their softmax in place
    head = max(batch.vocabulary, (4 + e) * shape.hidden_size) if base.head == "fp8" else 0
    at_loss = chunk * ((e + in_fp32) * batch.vocabulary + 2 * e * shape.hidden_size + head) if loss else 0.0
    gated = 2 if shape.gated_mlp else 1
    wide = (1 + gated) * shape.ffn_hidden_size / batch.tensor
    in_layer = addends + e * batch.tokens * (wide + shape.hidden_size) + max(each.made_again for each in chunks) - loss
    weight = max((w.size * w.itemsize for w in weights if w.trained), default=0)
    kept = turned_head_bytes(weights, base)
    return max(at_loss, in_layer, 0.0) + max(weight, unpacked) + kept + 2 * CUBLAS_WORKSPACE


def _communication(batch: Microbatch, *, copies: bool) -> float:
    """Between pipeline stages the last outputs are under way, and one hidden state each way; with `pp_comm_copy` the
    gradients too that the slots of the stage before hold up; a column layer under sequence parallelism gathers its
    input, and its gradient in backward."""
    held = 0.0
    if batch.layout.pipeline > 1:
        held += batch.hidden_bytes * (UNDER_WAY + 2 + (stage_copies.SLOTS if copies else 0))
    if batch.layout.sequence:
        held += 2 * batch.hidden_bytes * batch.tensor
    return held

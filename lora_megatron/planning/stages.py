# SPDX-License-Identifier: Apache-2.0
"""What the plan asks of a pipeline stage: its layers, and what these keep of a microbatch."""

from __future__ import annotations

from lora_megatron.config import Config
from lora_megatron.methods.method import Method
from lora_megatron.model.checks import layout_of
from lora_megatron.model.shape import ModelShape
from lora_megatron.planning.activations import ChunkBytes, Microbatch, chunk_bytes, embedding_bytes, head_bytes
from lora_megatron.planning.gradients import chunk_flows


def microbatch_of(config: Config, shape: ModelShape) -> Microbatch:
    """One microbatch of a configuration."""
    return Microbatch(
        shape,
        layout_of(config),
        config.data.micro_batch_size,
        config.data.sequence_length,
        2 if config.train.precision == "bf16" else 4,
        config.train.recompute,
        config.train.recompute_layers,
        config.method.dropout,
        config.data.packing,
        recompute_unit=config.train.recompute_unit,
        recompute_modules=config.train.recompute_modules,
        attention=config.train.attention,
    )


def chunk_layers(config: Config, shape: ModelShape) -> int:
    """Layers of each model chunk."""
    return shape.num_layers // (config.parallel.pipeline * config.parallel.virtual_pipeline)


def stage_layers(batch: Microbatch, stage: int) -> list[range]:
    """Global layers of each model chunk of pipeline stage `stage`."""
    layout = batch.layout
    count = batch.shape.num_layers // (layout.pipeline * layout.virtual_pipeline)
    positions = range(stage, layout.virtual_pipeline * layout.pipeline, layout.pipeline)
    return [range(position * count, (position + 1) * count) for position in positions]


def names_read_backward(method: Method, batch: Microbatch, stage: int) -> set[str]:
    """Names of the linear layers' weights of pipeline stage `stage` that a backward product reads."""
    parts = (
        chunk_flows(batch.shape, method, layers, recompute=batch.recompute) for layers in stage_layers(batch, stage)
    )
    return {linear.name for flows in parts for flow in flows for linear in flow.linears if linear.input_needs}


def chunks_of(shape: ModelShape, method: Method, batch: Microbatch, stage: int) -> list[ChunkBytes]:
    """What each model chunk of pipeline stage `stage` keeps of one microbatch."""
    chunks = []
    for layers in stage_layers(batch, stage):
        first, last = layers.start == 0, layers.stop == shape.num_layers
        flows = chunk_flows(shape, method, layers, recompute=batch.recompute)
        chunk = chunk_bytes(flows, layers, batch)
        extra = embedding_bytes(method, batch) if first else 0.0
        norm, loss = head_bytes(method, batch, input_needs=flows[-1].output_needs) if last else (0.0, 0.0)
        recomputed = chunk.recomputed + extra if chunk.recomputed else 0.0
        chunks.append(ChunkBytes(chunk.held + extra + norm, loss, recomputed, chunk.once, chunk.made_again))
    return chunks

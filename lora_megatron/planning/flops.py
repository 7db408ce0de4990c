# SPDX-License-Identifier: Apache-2.0
"""Floating point operations per token: what the mathematics needs, and what the machine executes.

A linear layer of N weights costs 2N forward, 2N for the gradient of its input (dgrad) and 2N for the gradient of its
weight (wgrad). Full fine-tuning executes 6N. A frozen layer executes 4N, and below the lowest trained parameter 2N. An
adapter of rank r is two linear layers of r (in + out) weights that train. The output layer counts, embeddings do not.

Core attention multiplies each query with the keys it may see, (s + 1) / 2 on average: 4 x keys x (heads x head_dim)
forward. Its gradient needs twice that; flash kernels execute 2.5 times, as they compute the scores anew, and with a
mask (packing, a short window) torch's kernels look at all s keys.

| counted          | dgrad                              | attention            | recomputation      | vocabulary |
|------------------|------------------------------------|----------------------|--------------------|------------|
| model FLOPs      | where a parameter below trains     | keys seen, 1 + 2     | never              | true       |
| hardware FLOPs   | also down to each stage's input    | as executed, 1 + 2.5 | as executed        | padded     |

Recomputation is another forward pass of a whole layer; of core attention; or of fc1, whose adapters' u is kept.

Utilisation from model FLOPs tells how fast training is, from hardware FLOPs how busy the GPU was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from lora_megatron.config import Config
from lora_megatron.methods.method import Method
from lora_megatron.model.build import padded_vocabulary
from lora_megatron.model.checks import layout_of
from lora_megatron.model.names import EMBEDDING, OUTPUT
from lora_megatron.model.recomputation import rebuilds_attention, rebuilt_layers, rebuilt_mlps
from lora_megatron.model.shape import ModelShape
from lora_megatron.planning.gradients import (
    LayerFlow,
    LinearFlow,
    chunk_flows,
    first_input_needs,
    layer_flow,
    layer_flows,
)

_BACKWARD_NEEDS, _BACKWARD_EXECUTES = 2.0, 2.5  # of attention, in units of its forward pass


@dataclass(frozen=True)
class Flops:
    """Floating point operations, a multiplication with its addition being two."""

    model: float
    hardware: float

    def __add__(self, other: Self) -> Flops:
        return Flops(self.model + other.model, self.hardware + other.hardware)

    def __mul__(self, factor: float) -> Flops:
        return Flops(self.model * factor, self.hardware * factor)


def step_flops(config: Config, shape: ModelShape, method: Method) -> Flops:
    """One optimizer step of the whole job: every token of the global batch, padding included."""
    return token_flops(config, shape, method) * (config.data.global_batch_size * config.data.sequence_length)


def token_flops(config: Config, shape: ModelShape, method: Method) -> Flops:
    """One token through the whole model, forward and backward, summed over the ranks that hold it."""
    total = Flops(0.0, 0.0)
    for stage in range(config.parallel.pipeline):
        total += stage_flops(config, shape, method, stage)
    return total


def stage_flops(config: Config, shape: ModelShape, method: Method, stage: int) -> Flops:
    """One token through pipeline stage `stage` with all its chunks, summed over its tensor ranks."""
    layout = layout_of(config)
    count = shape.num_layers // (layout.pipeline * layout.virtual_pipeline)
    lowest = _lowest_trained_layer(shape, method)
    hardware = model = 0.0
    for chunk in range(layout.virtual_pipeline):
        position = chunk * layout.pipeline + stage
        layers = range(position * count, (position + 1) * count)
        flows = chunk_flows(shape, method, layers, recompute=config.train.recompute)
        hardware += sum(_executed(*pair, config, shape) for pair in zip(flows, layers, strict=True))
        hardware += _rebuilt(flows, layers, config, shape)
        needed = layers.start > lowest or first_input_needs(method, recompute="none")
        model += sum(
            _needed(flow, config, shape, layer)
            for flow, layer in zip(layer_flows(shape, method, layers, input_needs=needed), layers, strict=True)
        )
        if layers.stop == shape.num_layers:
            head = head_flops(config, shape, method)
            model += head.model
            hardware += head.hardware
    return Flops(model, hardware)


def head_flops(config: Config, shape: ModelShape, method: Method) -> Flops:
    """One token through the output layer, forward and backward, summed over its tensor ranks."""
    trains = method.is_trainable(EMBEDDING if shape.tied_embeddings else OUTPUT)
    products = 2 * shape.hidden_size * (3 if trains else 2)
    return Flops(products * shape.vocab_size, products * padded_vocabulary(shape.vocab_size, config.parallel.tensor))


def _lowest_trained_layer(shape: ModelShape, method: Method) -> int:
    """The first layer with something to train; the number of layers if none has."""
    for layer in range(shape.num_layers):
        if layer_flow(shape, method, layer, input_needs=False).output_needs:
            return layer
    return shape.num_layers


def _needed(flow: LayerFlow, config: Config, shape: ModelShape, layer: int) -> float:
    attention = 4 * visible_keys(config, shape, layer) * shape.projection("q")[0]
    passes = 1 + (_BACKWARD_NEEDS if flow.attention_needs else 0)
    return sum(_forward(linear, shape) + _backward(linear, shape) for linear in flow.linears) + passes * attention


def _executed(flow: LayerFlow, layer: int, config: Config, shape: ModelShape) -> float:
    passes = 1 + (_BACKWARD_EXECUTES if flow.attention_needs else 0)
    products = sum(_forward(linear, shape) + _backward(linear, shape) for linear in flow.linears)
    return products + passes * _attention(config, shape, layer)


def _attention(config: Config, shape: ModelShape, layer: int) -> float:
    return 4 * _keys_looked_at(config, shape, layer) * shape.projection("q")[0]


def _rebuilt(flows: Sequence[LayerFlow], layers: range, config: Config, shape: ModelShape) -> float:
    """What is executed a second time in the backward pass of one chunk."""
    how, modules, asked = config.train.recompute, config.train.recompute_modules, config.train.recompute_layers
    whole = rebuilt_layers(how, asked, len(layers))
    total = 0.0
    for flow, layer in zip(flows[:whole], layers, strict=False):
        total += sum(_forward(linear, shape) for linear in flow.linears) + _attention(config, shape, layer)
    if rebuilds_attention(how, modules):
        total += sum(
            _attention(config, shape, layer) for flow, layer in zip(flows, layers, strict=True) if flow.attention_needs
        )
    for flow in flows[: rebuilt_mlps(how, modules, asked, len(layers))]:
        if flow.mlp_is_frozen and (flow.fc1.output_needs or flow.fc2.rank):
            updates = sum(2 * adapter.rank * shape.projection(adapter.target)[0] for adapter in flow.fc1.adapters)
            total += 2 * _weights(flow.fc1, shape) + updates
    return total


def _forward(linear: LinearFlow, shape: ModelShape) -> float:
    adapters = sum(2 * adapter.rank * sum(shape.projection(adapter.target)) for adapter in linear.adapters)
    return 2 * _weights(linear, shape) + adapters


def _backward(linear: LinearFlow, shape: ModelShape) -> float:
    weights = _weights(linear, shape)
    total = 2.0 * weights * (linear.input_needs + linear.weight)
    for adapter in linear.adapters:
        out, width = shape.projection(adapter.target)
        total += 4 * adapter.rank * out + 2 * adapter.rank * width * (1 + linear.input_needs)
    return total


def _weights(linear: LinearFlow, shape: ModelShape) -> int:
    return sum(math.prod(shape.projection(name)) for name in linear.projections)


def visible_keys(config: Config, shape: ModelShape, layer: int) -> float:
    """Keys a query of global layer `layer` may see, on average over a sequence that is one example."""
    length, window = config.data.sequence_length, shape.window(layer)
    if not 0 < window < length:
        return (length + 1) / 2
    return (window * (window + 1) / 2 + (length - window) * window) / length


def _keys_looked_at(config: Config, shape: ModelShape, layer: int) -> float:
    length = config.data.sequence_length
    masked = config.data.packing or 0 < shape.window(layer) < length
    return float(length) if masked else visible_keys(config, shape, layer)

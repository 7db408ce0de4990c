# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a layer need a gradient: it decides what is saved for the backward pass and what is multiplied.

A gradient goes down as far as something below still trains. Through a frozen linear it costs one product (dgrad) and
no saved tensor; a trained weight needs its input kept and a second product (wgrad); an adapter needs the same input
and products of rank r. Below the lowest trained parameter of the first pipeline stage nothing is saved and no product
runs. A later stage gets its input from its neighbour as a tensor that requires a gradient, as megatron-core's schedule
has it, so there the gradient always goes down to the first layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_megatron.layers.lora import Adapter
from lora_megatron.methods.method import Method
from lora_megatron.model.names import EMBEDDING, POSITIONS
from lora_megatron.model.shape import ModelShape


@dataclass(frozen=True)
class NormFlow:
    """A LayerNorm or RMSNorm."""

    input_needs: bool
    weight: bool
    """Whether its weight trains; `bias` likewise."""
    bias: bool

    @property
    def output_needs(self) -> bool:
        return self.input_needs or self.weight or self.bias


@dataclass(frozen=True)
class LinearFlow:
    """A linear layer, fused projections together."""

    name: str
    """Global, of its weight."""
    projections: tuple[str, ...]
    input_needs: bool
    weight: bool
    """Whether its weight trains; `bias` likewise."""
    bias: bool
    adapters: tuple[Adapter, ...]

    @property
    def output_needs(self) -> bool:
        return self.input_needs or self.weight or self.bias or bool(self.adapters)

    @property
    def rank(self) -> int:
        """Sum of the adapters' ranks."""
        return sum(adapter.rank for adapter in self.adapters)


@dataclass(frozen=True)
class LayerFlow:
    """A transformer layer, in the order it runs."""

    input_needs: bool
    norm1: NormFlow
    qk_norm: bool
    """Whether the norm over heads of q and k trains (False too where there is none)."""
    qkv: LinearFlow
    proj: LinearFlow
    norm2: NormFlow
    fc1: LinearFlow
    fc2: LinearFlow

    @property
    def linears(self) -> tuple[LinearFlow, ...]:
        return (self.qkv, self.proj, self.fc1, self.fc2)

    @property
    def attention_needs(self) -> bool:
        """Whether core attention has a backward pass."""
        return self.qkv.output_needs or self.qk_norm

    @property
    def mlp_is_frozen(self) -> bool:
        """Adapters aside; then fc1's output can be made again (`model.recomputation`)."""
        return not (self.fc1.weight or self.fc1.bias or self.fc2.weight)

    @property
    def output_needs(self) -> bool:
        return self.input_needs or self.proj.output_needs or self.fc2.output_needs


def layer_flow(shape: ModelShape, method: Method, layer: int, *, input_needs: bool) -> LayerFlow:
    """The flow through global layer `layer`, whose input needs a gradient or not."""
    prefix = f"decoder.layers.{layer}"

    def trains(name: str) -> bool:
        return method.is_trainable(f"{prefix}.{name}")

    def norm(name: str, needs: bool) -> NormFlow:
        has_bias = shape.normalization == "LayerNorm"
        return NormFlow(needs, trains(f"{name}.weight"), has_bias and trains(f"{name}.bias"))

    def linear(name: str, projections: tuple[str, ...], needs: bool, *, has_bias: bool) -> LinearFlow:
        adapters = tuple(adapter for projection in projections for adapter in method.adapters(layer, projection))
        bias = has_bias and trains(f"{name}.bias")
        return LinearFlow(f"{prefix}.{name}.weight", projections, needs, trains(f"{name}.weight"), bias, adapters)

    norm1 = norm("input_layernorm", input_needs)
    qkv = linear("self_attention.linear_qkv", ("q", "k", "v"), norm1.output_needs, has_bias=shape.qkv_bias)
    qk_norm = shape.qk_norm and trains("self_attention.q_layernorm.weight")
    proj = linear("self_attention.linear_proj", ("o",), qkv.output_needs or qk_norm, has_bias=shape.proj_bias)
    norm2 = norm("pre_mlp_layernorm", input_needs if shape.parallel_residual else input_needs or proj.output_needs)
    first = ("gate", "up") if shape.gated_mlp else ("fc1",)
    fc1 = linear("mlp.linear_fc1", first, norm2.output_needs, has_bias=shape.linear_bias)
    fc2 = linear("mlp.linear_fc2", ("fc2",), fc1.output_needs, has_bias=shape.linear_bias)
    return LayerFlow(input_needs, norm1, qk_norm, qkv, proj, norm2, fc1, fc2)


def layer_flows(shape: ModelShape, method: Method, layers: range, *, input_needs: bool) -> list[LayerFlow]:
    """The flows through consecutive global layers, the first of whose input needs a gradient or not."""
    flows = []
    for layer in layers:
        flows.append(layer_flow(shape, method, layer, input_needs=input_needs))
        input_needs = flows[-1].output_needs
    return flows


def first_input_needs(method: Method, *, recompute: str) -> bool:
    """Whether the input of layer 0 needs a gradient: it does when embeddings train, and under full recomputation."""
    return recompute == "full" or method.is_trainable(EMBEDDING) or method.is_trainable(POSITIONS)


def chunk_flows(shape: ModelShape, method: Method, layers: range, *, recompute: str) -> list[LayerFlow]:
    """The flows through the layers of a model chunk."""
    needs = layers.start > 0 or first_input_needs(method, recompute=recompute)
    return layer_flows(shape, method, layers, input_needs=needs)

# SPDX-License-Identifier: Apache-2.0
"""fc2(act(fc1(x))): megatron-core's MLP with our activation, and one function of it all where both weights are FP8.

A frozen MLP without adapters that multiplies in FP8 needs neither the activation's output nor the gradient of its
input as such, only their FP8 codes: they are computed and quantised in one pass, and never written (4 and 8 s b h
bytes that would be written and read again).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor

from lora_megatron.layers.activation import Activation
from lora_megatron.layers.storage.fp8 import Fp8Products
from lora_megatron.layers.storage.quantised_activation import activated, activation_gradient


class Mlp(MLP):
    """megatron-core's MLP; `activation` is applied to fc1's output and bias."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        *,
        activation: Activation,
        tp_group: dist.ProcessGroup | None = None,
        **megatron: Any,
    ) -> None:
        group = tp_group or mpu.get_tensor_model_parallel_group()
        super().__init__(config, submodules, tp_group=group)
        self.activation = activation

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **megatron: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[s or s/t, b, h] -> the same shape, and fc2's bias, which is added with the residual."""
        assert per_token_scale is None, "for experts, which this stack has not"
        fc1, fc2 = self.linear_fc1, self.linear_fc2
        pair = _fp8_pair(fc1, fc2)
        if pair is None:
            y = self.activation(*fc1(hidden_states))
            output: tuple[Tensor, Tensor | None] = fc2(y)
            return output
        if fc1.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=self.tp_group)
        group = self.tp_group if fc1.allreduce_dgrad else None
        partial = _FrozenFp8.apply(hidden_states, *pair, fc1.bias, self.activation, group)
        if fc2.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(partial, group=self.tp_group), fc2.bias
        return reduce_from_tensor_model_parallel_region(partial, group=self.tp_group), fc2.bias


def _fp8_pair(fc1: Any, fc2: Any) -> tuple[Fp8Products, Fp8Products] | None:
    """Both weights, if they are frozen, multiply in FP8, and nothing else wants what lies between them."""
    first, second = getattr(fc1, "stored", None), getattr(fc2, "stored", None)
    if not (isinstance(first, Fp8Products) and isinstance(second, Fp8Products)):
        return None
    asked = fc1.adapters or fc2.adapters or (fc1.bias is not None and fc1.bias.requires_grad)
    return None if asked else (first, second)


class _FrozenFp8(torch.autograd.Function):
    """x [s, b, h] -> this rank's part of the sum that is the output; fc1's output is all that is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        fc1: Fp8Products,
        fc2: Fp8Products,
        bias: Tensor | None,
        activation: Activation,
        sum_input_gradient_over: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.pair, ctx.activation, ctx.group = (fc1, fc2), activation, sum_input_gradient_over
        between = fc1.linear(x.reshape(-1, x.shape[-1]), None)
        ctx.save_for_backward(between, bias)
        y = activated(activation, between, bias, factor=fc2.forward_factor(), group=fc2.forward_group)
        return fc2.linear_of(y, None, x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (grad,) = grads
        between, bias = ctx.saved_tensors
        fc1, fc2 = ctx.pair
        dy = fc2.input_gradient(grad.reshape(-1, grad.shape[-1]))
        factor, group = fc1.backward_factor(), fc1.backward_group
        gradient = activation_gradient(ctx.activation, between, bias, dy, factor=factor, group=group)
        del dy
        grad_x = fc1.input_gradient_of(gradient, grad.dtype).view(*grad.shape[:-1], -1)
        if ctx.group is not None:
            dist.all_reduce(grad_x, group=ctx.group)
        return grad_x, None, None, None, None, None


@dataclass
class MlpSpec:
    """What megatron-core builds an `Mlp` from. Its own ModuleSpec it would take for an MLP it does not know."""

    submodules: MLPSubmodules
    params: dict[str, Any]
    module: type = field(default=Mlp)

    def __call__(self, **megatron: Any) -> Mlp:
        """Newer versions call what they are given."""
        return Mlp(submodules=self.submodules, **self.params, **megatron)

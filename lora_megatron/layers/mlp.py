# SPDX-License-Identifier: Apache-2.0
"""fc2(act(fc1(x))): megatron-core's MLP with our activation, and one function of it all where that does more.

A frozen MLP that multiplies in FP8 needs neither the activation's output nor the gradient of its input as such, only
their FP8 codes: they are computed and quantised in one pass (`frozen_mlp`). The adapters of both layers, in any format,
have their part in the activation's pass. And a frozen MLP of any format can leave fc1's output to be made again in the
backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor

from lora_megatron.layers.activation import Activation
from lora_megatron.layers.frozen_mlp import frozen_mlp
from lora_megatron.layers.residual import LeftToAdd
from lora_megatron.layers.storage.fp8 import Fp8Products
from lora_megatron.layers.storage.stored import stored_of


class Mlp(MLP):
    """megatron-core's MLP; `activation` is applied to fc1's output and bias.

    Args:
        rebuild: where the weights are frozen, make fc1's output again in the backward pass instead of keeping it.
        The rest is megatron-core's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        *,
        activation: Activation,
        rebuild: bool = False,
        tp_group: dist.ProcessGroup | None = None,
        **megatron: Any,
    ) -> None:
        group = tp_group or mpu.get_tensor_model_parallel_group()
        super().__init__(config, submodules, tp_group=group)
        self.activation, self.rebuild = activation, rebuild

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **megatron: Any
    ) -> tuple[Tensor, LeftToAdd]:
        """[s or s/t, b, h] -> the same shape, and what is added with the residual: fc2's bias, perhaps its update."""
        assert per_token_scale is None, "for experts, which this stack has not"
        fc1, fc2 = self.linear_fc1, self.linear_fc2
        if not (_is_frozen(fc1, fc2) and (self.rebuild or _gains_by_one_function(fc1, fc2))):
            y = self.activation(*fc1(hidden_states))
            result: tuple[Tensor, LeftToAdd] = fc2(y)
            return result
        output, u = frozen_mlp(hidden_states, fc1, fc2, self.activation, rebuild=self.rebuild)
        if not fc2.sequence_parallel:
            output = reduce_from_tensor_model_parallel_region(output, group=self.tp_group)
            u = None if u is None else fc2.summed(u)
        if u is None:
            return output, fc2.bias
        added: tuple[Tensor, LeftToAdd] = fc2.with_update(output, fc2.bias, u)
        return added


def _is_frozen(fc1: Any, fc2: Any) -> bool:
    """Whether neither weight trains, nor the bias between them."""
    between = fc1.bias is not None and fc1.bias.requires_grad
    return not (fc1.weight.requires_grad or fc2.weight.requires_grad or between)


def _gains_by_one_function(*linears: Any) -> bool:
    """Whether they multiply in FP8, or one of them is adapted."""
    in_fp8 = all(isinstance(stored_of(linear.weight), Fp8Products) for linear in linears)
    return in_fp8 or any(linear.adapters for linear in linears)


@dataclass
class MlpSpec:
    """What megatron-core builds an `Mlp` from. Its own ModuleSpec it would take for an MLP it does not know."""

    submodules: MLPSubmodules
    params: dict[str, Any]
    module: type = field(default=Mlp)

    def __call__(self, **megatron: Any) -> Mlp:
        """Newer versions call what they are given."""
        return Mlp(submodules=self.submodules, **self.params, **megatron)

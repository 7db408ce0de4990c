# SPDX-License-Identifier: Apache-2.0
"""A transformer layer whose two branches read the same input (GPT-J, GPT-NeoX; Black et al. 2022, section 2.1).

y = x + attention(norm_1(x)) + mlp(norm_2(x))          x, y [s or s/t, b, h]
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class ParallelResidualLayer(TransformerLayer):
    """megatron-core's layer with the branches side by side instead of one after the other."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """x [s or s/t, b, h] -> the same shape, and megatron-core's context, which a decoder has not."""
        kwargs.pop("dynamic_inference_decode_only", None)
        x: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        attended, context = self._forward_attention(*args, **kwargs)  # x + attention(norm_1(x))
        fed = self.mlp(self.pre_mlp_layernorm(x))
        add = self.mlp_bda(self.training, self.config.bias_dropout_fusion)
        with self.bias_dropout_add_exec_handler():
            return add(fed, attended, self.hidden_dropout), context

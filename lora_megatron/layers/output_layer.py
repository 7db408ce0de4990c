# SPDX-License-Identifier: Apache-2.0
"""megatron-core's output layer over a weight in another format (`layers.storage`).

    z = x W^T       x [s or s/t, b, h], W [V/t, h], this rank's rows -> z [s, b, V/t]

It is called where there are no labels, by decoding; losses take its weight (`layers.output_products`). Where the weight
is this layer's alone, its own or the last pipeline stage's copy of a tied embedding, the format's bytes are all that
is kept of it. On a stage that has the embedding too, tokens are looked up in the table: there they are kept beside it.
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from torch import Tensor, nn

from lora_megatron.layers.frozen import stored_linear
from lora_megatron.layers.storage.choose import StorageFormat
from lora_megatron.layers.storage.fp8 import StoredFp8
from lora_megatron.layers.storage.stored import hand_over, handle_put_aside, store_beside


class StoredOutputLayer(ColumnParallelLinear):
    """In the place of `layer`, with what its weight is stored in.

    Args:
        layer: megatron-core's, without a bias.
        weight: [V/t, h], frozen: the layer's own, or a tied table that it has none beside. What a loader writes into
            it (`storage.stored.writable`) is stored.
        storage: FP8.
    """

    stored: StoredFp8

    def __init__(self, layer: ColumnParallelLinear, weight: nn.Parameter, storage: StorageFormat) -> None:
        assert layer.bias is None
        super().__init__(
            layer.input_size,
            layer.output_size,
            config=layer.config,
            init_method=layer.config.init_method,
            bias=False,
            gather_output=layer.gather_output,
            skip_weight_param_allocation=True,
            tp_group=layer.tp_group,
        )
        del self.weight  # no parameter to torch, until it is one or a parameter that is not there
        self.register_parameter("weight", layer.weight)
        rows, columns = weight.shape
        stored = storage.make(rows, columns, device=weight.device, axis=0, group=self.tp_group)
        assert isinstance(stored, StoredFp8)
        if layer.weight is None:
            self.stored = stored
            store_beside(weight, stored)
        else:
            hand_over(self, stored)

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        with handle_put_aside(self):
            moved: nn.Module = super()._apply(*args, **kwargs)
        return moved

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """megatron-core's seam for the product; `weight` is a shape, or the table that `stored` is beside."""
        if kwargs["sequence_parallel"]:
            input = gather_from_sequence_parallel_region(input, group=self.tp_group)
        group = self.tp_group if kwargs["allreduce_dgrad"] else None
        return stored_linear(input, self.stored, sum_input_gradient_over=group)

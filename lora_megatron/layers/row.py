# SPDX-License-Identifier: Apache-2.0
"""Row-parallel linear with LoRA: W and A cut by columns (inputs), B on every rank.

    u_t = x_t A_t^T                       x_t [s, b, in / t], u_t [s, b, r] a partial sum
    u   = g(u_t)                          all-reduce over the tensor group, or reduce-scatter along s with y (rank-wide)
    y   = g(x_t W_t^T) + (alpha / r) u B^T        B is applied once, after the sum; the bias likewise

Without sequence parallelism dB is complete and equal on all ranks. With it a rank sees its tokens only, so dB must be
summed over the tensor-parallel group (declared on B). dA_t is this rank's alone in both cases.
"""

from __future__ import annotations

from typing import Any, cast

from megatron.core.tensor_parallel import (
    RowParallelLinear,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from lora_megatron.layers.dropout import Dropout
from lora_megatron.layers.frozen import frozen_linear, scattered_linear
from lora_megatron.layers.lora import AdapterSet, LoraFactors, seed_from
from lora_megatron.layers.low_rank import Update, add_low_rank
from lora_megatron.layers.low_rank_input import low_rank_input
from lora_megatron.layers.qkv import whole
from lora_megatron.layers.residual import BiasAndUpdate, LeftToAdd
from lora_megatron.layers.sequence_shards import SequenceShards
from lora_megatron.layers.sharding import REPLICATED, Shard, declare
from lora_megatron.layers.storage.choose import StorageFormat
from lora_megatron.layers.storage.stored import device_of, hand_over, handle_put_aside


class LoraRowParallelLinear(RowParallelLinear):
    """megatron-core's row-parallel linear, frozen or trained, with at most one adapter.

    Args:
        adapters: the adapter, if any.
        has_bias: whether there is a bias; megatron-core's one switch for all linear layers is not asked.
        storage: the format of a frozen weight; None keeps it as a parameter.
        skip_update_add: hand the adapter's update on beside the bias instead of adding it, for the addition of the
            residual (`layers.residual`), as megatron-core's skip_bias_add does with the bias.
        The rest is megatron-core's.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        adapters: AdapterSet,
        has_bias: bool,
        storage: StorageFormat | None = None,
        skip_update_add: bool = False,
        **megatron: Any,
    ) -> None:
        super().__init__(input_size, output_size, **{**megatron, "bias": has_bias})
        self.skip_update_add = skip_update_add
        declare(self.weight, Shard(1))
        if self.bias is not None:
            declare(self.bias, REPLICATED, sum_over_sequence_shards=self.sequence_parallel)
        self.shards = SequenceShards.over(
            self.tp_group,
            overlap=self.sequence_parallel and self.config.tp_comm_overlap,
            device=device_of(self.weight),
            beside=adapters.rank,
        )
        self.dropout = adapters.dropout
        self.dropout_seed = seed_from(adapters.seed, "dropout", adapters.name)
        self.adapters = self.make_adapters(adapters)
        if storage is not None:
            rows, columns = self.weight.shape
            device = self.weight.device
            hand_over(self, storage.make(rows, columns, device=device, axis=1, group=self.tp_group))

    def make_adapters(self, adapters: AdapterSet) -> nn.ModuleDict:
        """New factors for this layer; assigned to `self.adapters` they are what it computes with."""
        assert len(adapters.adapters) <= 1, "a row-parallel layer is one projection"
        return nn.ModuleDict(
            {
                adapter.target: LoraFactors(
                    adapter,
                    in_features=self.input_size,
                    out_features=self.output_size,
                    shard_a=Shard(1),
                    shard_b=REPLICATED,
                    partial_a=False,
                    partial_b=self.sequence_parallel,
                    tensor_rank=self.tp_group.rank(),
                    tensor_size=self.tp_group.size(),
                    seed=adapters.seed,
                    name=f"{adapters.name}.{adapter.target}",
                    dtype=self.weight.dtype,
                    device=device_of(self.weight),
                )
                for adapter in adapters.adapters
            }
        )

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        with handle_put_aside(self):
            moved: nn.Module = super()._apply(*args, **kwargs)
        return moved

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The seam megatron-core leaves for the GEMM: dgrad-only when the weight is frozen."""
        if weight.requires_grad:
            result: Tensor = super()._forward_impl(input=input, weight=weight, bias=bias, **kwargs)
            return result
        assert bias is None, "a row-parallel bias is added after the sum over ranks"
        return frozen_linear(input, weight)

    def forward(self, input_: Tensor) -> tuple[Tensor, LeftToAdd]:
        """[s, b, in / t] -> [s or s/t, b, out], and what is left to the caller to add."""
        if not self.adapters:
            return self._without_update(input_)[:2]
        u, x = low_rank_input(input_, [self.pair.lora_A], self.dropout_now())
        output, bias, summed = self._without_update(x, u)
        return self.with_update(output, bias, self.summed(u) if summed is None else summed)

    def _without_update(self, x: Tensor, u: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The output, the bias where it is left to the caller, and u summed over ranks if it went with the output."""
        if self._u_goes_with_output:
            output, u = scattered_linear(x, self.weight, self.shards, u)
            return output, self.bias, u
        output, bias = super().forward(x)
        return output, bias, None

    @property
    def _u_goes_with_output(self) -> bool:
        """To be summed over ranks as it is; a trained weight has megatron-core sum its output."""
        return self.sequence_parallel and self.skip_bias_add and not self.weight.requires_grad

    @property
    def pair(self) -> LoraFactors:
        """Of the one adapter, where there is one."""
        (pair,) = self.adapters.values()
        return cast(LoraFactors, pair)

    def dropout_now(self) -> Dropout | None:
        """Of this microbatch, on this rank's inputs."""
        if not (self.dropout and self.training):
            return None
        cut = (self.tp_group.rank(), self.tp_group.size())
        return Dropout.of_this_microbatch(self.dropout, self.dropout_seed, features=cut)

    def summed(self, u: Tensor) -> Tensor:
        """u [s, b, r], a partial sum over this rank's inputs, by a collective of its own -> [s or s/t, b, r]."""
        if self.sequence_parallel:
            u = reduce_scatter_to_sequence_parallel_region(u, group=self.tp_group)
        elif self.tp_group.size() > 1:
            u = reduce_from_tensor_model_parallel_region(u, group=self.tp_group)
        return u

    def with_update(self, output: Tensor, bias: Tensor | None, u: Tensor) -> tuple[Tensor, LeftToAdd]:
        """The output [s or s/t, b, out] with the adapter's update added, or beside the bias what adds it; from
        u [s or s/t, b, r], both summed over ranks."""
        update = self.low_rank_update(u)
        if self.skip_update_add:
            return output, BiasAndUpdate.of(bias, update)
        return add_low_rank(output, update), bias

    def low_rank_update(self, u: Tensor) -> Update:
        """What the adapter adds to the output, from u [s or s/t, b, r], both summed over ranks."""
        aside = self._u_goes_with_output and self.shards.exchange is not None
        return Update(whole("", self.output_size), (self.pair.scale,), u, (self.pair.lora_B,), aside)

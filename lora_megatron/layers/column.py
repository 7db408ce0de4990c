# SPDX-License-Identifier: Apache-2.0
"""Column-parallel linear with LoRA: W and B cut by rows (outputs), A on every rank.

    x [s, b, h] replicated:        u = x A^T        f: identity forward, all-reduce of du backward (rank-wide)
    x [s/t, b, h] sequence shard:  u = x A^T        g: all-gather of u along s forward, reduce-scatter backward, with x
    y_t = x W_t^T + (alpha / r) u B_t^T

The collectives carry r numbers per token, not h. In the first case dA is complete and equal on all ranks; in the
second each rank sees its tokens only, so dA must be summed over the tensor-parallel group (declared on A).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn

from lora_megatron.layers.dropout import Dropout
from lora_megatron.layers.frozen import frozen_linear, gathered_linear
from lora_megatron.layers.lora import AdapterSet, LoraFactors, seed_from
from lora_megatron.layers.low_rank import Update, add_low_rank
from lora_megatron.layers.low_rank_input import low_rank_input
from lora_megatron.layers.qkv import Part
from lora_megatron.layers.sequence_shards import SequenceShards
from lora_megatron.layers.sharding import REPLICATED, Shard, declare
from lora_megatron.layers.storage.choose import StorageFormat
from lora_megatron.layers.storage.stored import device_of, hand_over, handle_put_aside


class LoraColumnParallelLinear(ColumnParallelLinear):
    """megatron-core's column-parallel linear, frozen or trained, with any number of adapters on its projections.

    Args:
        parts: from the number of local output rows to the projections they hold (`layers.qkv`).
        adapters: which of them are adapted.
        has_bias: whether there is a bias; megatron-core's one switch for all linear layers is not asked.
        blocks: 2 for a gated fc1, whose gate and up halves are cut separately.
        storage: the format of a frozen weight; None keeps it as a parameter.
        The rest is megatron-core's.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        parts: Callable[[int], tuple[Part, ...]],
        adapters: AdapterSet,
        has_bias: bool,
        blocks: int = 1,
        storage: StorageFormat | None = None,
        **megatron: Any,
    ) -> None:
        super().__init__(input_size, output_size, **{**megatron, "bias": has_bias})
        declare(self.weight, Shard(0, blocks))
        if self.bias is not None:
            declare(self.bias, Shard(0, blocks))
        self.shards = SequenceShards.over(
            self.tp_group,
            overlap=self.sequence_parallel and self.config.tp_comm_overlap,
            device=device_of(self.weight),
            beside=adapters.rank,
        )
        self.dropout = adapters.dropout
        self.dropout_seed = seed_from(adapters.seed, "dropout", adapters.name)
        self.parts = {part.name: part for part in parts(self.output_size_per_partition)}
        self.adapters = self.make_adapters(adapters)
        if storage is not None:
            rows, columns = self.weight.shape
            device = self.weight.device
            hand_over(self, storage.make(rows, columns, device=device, axis=0, group=self.tp_group))

    def make_adapters(self, adapters: AdapterSet) -> nn.ModuleDict:
        """New factors for this layer's projections; assigned to `self.adapters` they are what it computes with."""
        return nn.ModuleDict(
            {
                adapter.target: LoraFactors(
                    adapter,
                    in_features=self.input_size,
                    out_features=self.parts[adapter.target].rows * self.tp_group.size(),
                    shard_a=REPLICATED,
                    shard_b=Shard(0),
                    partial_a=self.sequence_parallel,
                    partial_b=False,
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

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **kwargs: Any) -> Tensor:
        """The seam megatron-core leaves for the GEMM: dgrad-only when the weight is frozen."""
        if weight.requires_grad:
            result: Tensor = super()._forward_impl(input=input, weight=weight, bias=bias, **kwargs)
            return result
        if kwargs["sequence_parallel"]:
            return self._gathered(input, weight, bias)[0]
        group = self.tp_group if kwargs["allreduce_dgrad"] else None
        frozen, trained = _frozen_or_trained(bias)
        output = frozen_linear(input, weight, frozen, sum_input_gradient_over=group)
        return output if trained is None else output + trained

    def _gathered(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        u: Tensor | None = None,
        factors: tuple[Tensor, ...] = (),
        on_own: Callable[[Tensor], object] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The output and u of all ranks' tokens, from x and u of this rank's; `factors` as of `low_rank_input`."""
        frozen, trained = _frozen_or_trained(bias)
        output, u = gathered_linear(x, weight, frozen, self.shards, u, factors, on_own)
        return output if trained is None else output + trained, u

    def forward(
        self, input_: Tensor, *args: Any, leave_update: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor | Update | None]:
        """[s or s/t, b, in] -> [s, b, out / t], and the bias where it is left to the caller; with `leave_update` the
        output without the adapters' update, or with it in some rows, and in the bias's place the update, for a caller
        who adds it: so attention asks while gradients are recorded, and what a hook on the layer sees of the output is
        written over then."""
        if not self.adapters:
            plain: tuple[Tensor, Tensor | None] = super().forward(input_, *args, **kwargs)
            return plain
        # A bias that trains is added behind the product: own rows would get update and bias the other way round.
        bias_is_part = self.bias is None or not self.bias.requires_grad
        adds_own = leave_update and bias_is_part and self._goes_through_exchange
        output, u, left = self._without_update(input_, *args, adds_own=adds_own, **kwargs)
        update = self.low_rank_update(u)
        if leave_update:
            assert left is None, "a bias and an update left: one of them would be lost"
            return output, replace(update, added=self.shards.own_of(update.rows)) if adds_own else update
        return add_low_rank(output, update), left

    def _without_update(
        self, input_: Tensor, *args: Any, adds_own: bool, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The output without it, or with that of this rank's tokens; u of the output's tokens, and the bias that is
        left."""
        u, x, factors = self.low_rank_input(input_)
        if self._u_goes_with_tokens:
            assert not self.gather_output, "sequence parallelism gathers tokens, not outputs"
            assert (args, kwargs) == ((), {}), "another weight, or an output to gather"
            added, left = (None, self.bias) if self.skip_bias_add else (self.bias, None)
            on_own = self.low_rank_update(u.detach()).add_to if adds_own else None
            output, whole = self._gathered(x, self.weight, added, u, factors, on_own)
            assert whole is not None
            return output, whole, left
        output, left = super().forward(x, *args, **kwargs)
        return output, u, left

    @property
    def _u_goes_with_tokens(self) -> bool:
        """A trained weight has megatron-core gather its tokens."""
        return self.sequence_parallel and not self.weight.requires_grad

    @property
    def _goes_through_exchange(self) -> bool:
        return self._u_goes_with_tokens and self.shards.exchange is not None

    def low_rank_input(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """u = x A^T of all adapters, from x [s or s/t, b, in]; x for the large product; and A's. With sequence shards
        over a frozen weight u is this rank's tokens' [s/t, b, sum of r], to go with x; else it is whole [s, b, sum of
        r]. If there are any A's, the product's gradient of x must have du A in it."""
        pairs = [cast(LoraFactors, pair) for pair in self.adapters.values()]
        drop = None
        if self.dropout and self.training:
            cut = (self.tp_group.rank(), self.tp_group.size()) if self.sequence_parallel else (0, 1)
            drop = Dropout.of_this_microbatch(self.dropout, self.dropout_seed, sequence=cut)
        factors = tuple(pair.lora_A for pair in pairs)
        # Where a sum over ranks ends in dx and du, du A is added in the same pass.
        product_adds = self._u_goes_with_tokens and drop is None
        # x is read once for all A's of the layer, and one collective serves them all.
        u, x = low_rank_input(x, factors, drop, product_adds=product_adds)  # [s or s/t, b, sum of r]
        if self._u_goes_with_tokens:
            return u, x, factors if product_adds else ()
        if self.sequence_parallel:
            u = gather_from_sequence_parallel_region(u, group=self.tp_group)  # g
        elif self.tp_group.size() > 1:
            u = copy_to_tensor_model_parallel_region(u, group=self.tp_group)  # f
        return u, x, ()

    def low_rank_update(self, u: Tensor) -> Update:
        """What the adapters add to the output, from u [s, b, sum of r]."""
        pairs = [cast(LoraFactors, pair) for pair in self.adapters.values()]
        parts = tuple(self.parts[target] for target in self.adapters)
        bs = tuple(pair.lora_B for pair in pairs)
        return Update(parts, tuple(pair.scale for pair in pairs), u, bs, aside=self._goes_through_exchange)


def _frozen_or_trained(bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A bias as what it is above a frozen weight: part of the product, or (BitFit) added behind it."""
    return (None, bias) if bias is not None and bias.requires_grad else (bias, None)

# SPDX-License-Identifier: Apache-2.0
"""Frozen weights in NF4 with double quantisation (QLoRA, Dettmers et al. 2023, section 3).

Blocks of 64 inputs of a row share a scale, their largest magnitude; each weight is the nearest of 16 levels, the
quantiles of a normal distribution; two weights make a byte, the first in the high half, as bitsandbytes packs them.
The block scales are quantised in turn: groups of at most 256 share a lowest value and a step in fp32, and each scale is
a byte between. With 64 weights and 256 scales a group that is 4 + 8/64 + 64/(64 * 256) = 4.13 bits per weight.

Groups run along the axis that is not cut over ranks: over the blocks of a row for axis 0, over the rows of a block
column for axis 1. So a shard's bytes are those of the whole weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_megatron.layers.storage.fp8 import FP8, LARGEST, Fp8Products, kernels, scale_of
from lora_megatron.layers.storage.stored import Stored

BLOCK = 64
GROUP = 256
# Table in appendix E of the QLoRA paper.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def nearest_levels(values: Tensor) -> Tensor:
    """Index of the nearest of the 16 levels, for values in [-1, 1]; same shape, int."""
    levels = torch.tensor(LEVELS, device=values.device)
    return torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)


class StoredNf4(Stored):
    """Half a byte per weight, multiplied in the activations' precision."""

    packed: Tensor
    block_codes: Tensor
    lowest: Tensor
    step: Tensor
    levels: Tensor
    fp8_scale: Tensor

    def __init__(self, out_features: int, in_features: int, *, device: torch.device, **cut: Any) -> None:
        super().__init__(out_features, in_features, **cut)
        assert in_features % BLOCK == 0, "checked with the configuration"
        blocks = (out_features, in_features // BLOCK)
        groups = list(blocks)
        groups[1 - self.axis] = -(-groups[1 - self.axis] // GROUP)
        self.register_buffer(
            "packed", torch.zeros(out_features, in_features // 2, dtype=torch.uint8, device=device), False
        )
        self.register_buffer("block_codes", torch.zeros(blocks, dtype=torch.uint8, device=device), False)
        self.register_buffer("lowest", torch.zeros(groups, device=device), False)
        self.register_buffer("step", torch.zeros(groups, device=device), False)
        self.register_buffer("levels", torch.tensor(LEVELS, device=device), False)
        self.register_buffer("fp8_scale", torch.ones(blocks[self.axis], device=device), False)

    def store(self, weight: Tensor) -> None:
        blocks = weight.float().unflatten(1, (-1, BLOCK))  # [out, in / 64, 64]
        self._store_block_scales(blocks.abs().amax(2))
        scale = self.block_scales().unsqueeze(2)
        codes = nearest_levels(torch.where(scale > 0, blocks / scale, 0.0)).flatten(1).to(torch.uint8)
        self.packed.copy_(codes[:, 0::2] << 4 | codes[:, 1::2])

    def _store_block_scales(self, scales: Tensor) -> None:
        """scales [out, in / 64] -> bytes between each group's lowest and highest."""
        inner = 1 - self.axis
        parts = scales.split(GROUP, inner)
        lowest = torch.cat([part.amin(inner, keepdim=True) for part in parts], inner)
        highest = torch.cat([part.amax(inner, keepdim=True) for part in parts], inner)
        self.lowest.copy_(lowest)
        self.step.copy_((highest - lowest) / 255)
        low, step = self._spread(self.lowest), self._spread(self.step)
        self.block_codes.copy_(torch.where(step > 0, (scales - low) / step, 0.0).round())
        self.fp8_scale.copy_(scale_of(self.block_scales().amax(inner)))  # per row, or per block column

    def _spread(self, per_group: Tensor) -> Tensor:
        return _spread(per_group, self.axis, self.block_codes.shape[1 - self.axis])

    def block_scales(self) -> Tensor:
        """The largest magnitude of each block, as remembered: [out, in / 64] fp32."""
        return self.block_codes * self._spread(self.step) + self._spread(self.lowest)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        return self._unpack(dtype)

    def _unpack(self, dtype: torch.dtype, *, scale: Tensor | None = None, transposed: bool = False) -> Tensor:
        """W / scale in `dtype`: [out, in], or [in, out] transposed; `scale` per row, or per block of columns."""
        if kernels is not None and self.packed.is_cuda:
            return kernels.unpack(
                self.packed,
                self.block_codes,
                self.lowest,
                self.step,
                self.levels,
                scale=scale,
                axis=self.axis,
                group=GROUP,
                dtype=dtype,
                transposed=transposed,
            )
        ratio = self.block_scales()
        if scale is not None:  # levels are at most 1
            ratio = (ratio / (scale[:, None] if self.axis == 0 else scale)).clamp(max=LARGEST)
        codes = torch.stack([self.packed >> 4, self.packed & 15], 2).flatten(1)
        weights = self.levels[codes.int()].unflatten(1, (-1, BLOCK)) * ratio.unsqueeze(2)
        values = weights.flatten(1).to(dtype)
        return values.t().contiguous() if transposed else values


class StoredNf4ForFp8(Fp8Products, StoredNf4):
    """The same bytes, unpacked to FP8 for each product."""

    def column_scale(self) -> Tensor:
        return self.fp8_scale if self.axis == 0 else self.fp8_scale.repeat_interleave(BLOCK)

    def store(self, weight: Tensor) -> None:
        super().store(weight)
        self.forget_transposed()

    def fp8_codes(self, *, transposed: bool) -> Tensor:
        return self._unpack(FP8, scale=self.fp8_scale, transposed=transposed)


def _spread(per_group: Tensor, axis: int, length: int) -> Tensor:
    """[groups] values along the inner axis, repeated to `length` blocks or rows."""
    return per_group.repeat_interleave(GROUP, 1 - axis).narrow(1 - axis, 0, length)

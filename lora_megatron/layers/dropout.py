# SPDX-License-Identifier: Apache-2.0
"""LoRA's dropout: inverted dropout whose mask is a function of (seed, sample, position, feature) alone.

Masks agree where the input is replicated over ranks and differ where it is sharded, and a mask is never kept: the
backward pass, and a recomputed forward pass, draw it again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_megatron.layers.lora import seed_from

try:
    from lora_megatron.layers import dropout_kernels as kernels
except ImportError:  # no Triton: masks from torch's generator
    kernels = None  # type: ignore[assignment]


def set_first_sample(index: int) -> None:
    """Say which sample of the run's stream is the first of the microbatch about to run forward.

    The index is kept as the seed of torch's default generator, because activation recomputation saves and restores
    that generator: a recomputed forward, however late it runs, then draws the masks of its own microbatch.
    """
    torch.manual_seed(index)


@dataclass(frozen=True)
class Dropout:
    """The dropout of one layer on one microbatch.

    Args:
        p: share of the values that become zero.
        seed: the layer's own.
        first_sample: the stream's index of the microbatch's first sample.
        sequence, features: (rank, size) of the axis along which a rank's x [s, b, n] is cut.
    """

    p: float
    seed: int
    first_sample: int
    sequence: tuple[int, int] = (0, 1)
    features: tuple[int, int] = (0, 1)

    @classmethod
    def of_this_microbatch(
        cls, p: float, seed: int, *, sequence: tuple[int, int] = (0, 1), features: tuple[int, int] = (0, 1)
    ) -> Dropout:
        """For the samples that `set_first_sample` has announced."""
        return cls(p, seed, torch.default_generator.initial_seed(), sequence, features)

    def __call__(self, x: Tensor) -> Tensor:
        """x [s, b, n] with the mask applied, which is linear: the gradient goes through the same call."""
        seeds = [seed_from(self.seed, self.first_sample + column) for column in range(x.shape[1])]
        if kernels is not None and x.is_cuda:
            return kernels.drop(x.contiguous(), seeds, self.p, sequence=self.sequence, features=self.features)
        steps, _, width = x.shape
        full = (steps * self.sequence[1], width * self.features[1])
        keep = torch.empty_like(x, dtype=torch.bool)
        generator = torch.Generator(x.device)
        for column, seed in enumerate(seeds):  # the whole sample's mask is drawn, and cut
            mask = torch.rand(full, generator=generator.manual_seed(seed), device=x.device) >= self.p
            rows = mask.chunk(self.sequence[1], 0)[self.sequence[0]]
            keep[:, column] = rows.chunk(self.features[1], 1)[self.features[0]]
        return x * keep / (1 - self.p)

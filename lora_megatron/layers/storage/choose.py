# SPDX-License-Identifier: Apache-2.0
"""From `base.storage`, `base.gemm` and the like to a stored weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lora_megatron.layers.storage.fp8 import Fp8Products, StoredFp8
from lora_megatron.layers.storage.nf4 import StoredNf4, StoredNf4ForFp8
from lora_megatron.layers.storage.stored import Stored


@dataclass(frozen=True)
class StorageFormat:
    """`kind` is fp8 or nf4; `gemm` the precision of an NF4 weight's products, bf16 (that of training) or fp8;
    `fast_accum` which FP8 products add up in shorter registers: none, those of the forward pass, or both; `transposes`
    how many backward products read an FP8 weight that was turned round once, 0 for all of them."""

    kind: str
    gemm: str = "bf16"
    fast_accum: str = "forward"
    transposes: int = 1

    @property
    def in_fp8(self) -> bool:
        """Whether products are done in FP8 (`Fp8Products`)."""
        return self.kind == "fp8" or self.gemm == "fp8"

    def make(self, out_features: int, in_features: int, *, device: torch.device, **cut: Any) -> Stored:
        """Room for a weight [out, in] of this rank; `cut` as in `Stored`."""
        if not self.in_fp8:
            return StoredNf4(out_features, in_features, device=device, **cut)
        kind = StoredFp8 if self.kind == "fp8" else StoredNf4ForFp8
        stored: Fp8Products = kind(out_features, in_features, device=device, **cut)
        stored.fast_forward = self.fast_accum in ("forward", "both")
        stored.fast_backward = self.fast_accum == "both"
        stored.transposes = self.transposes
        return stored

# SPDX-License-Identifier: Apache-2.0
"""From `base.storage` and `base.gemm` to a stored weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lora_megatron.layers.storage.fp8 import StoredFp8
from lora_megatron.layers.storage.nf4 import StoredNf4, StoredNf4ForFp8
from lora_megatron.layers.storage.stored import Stored


@dataclass(frozen=True)
class StorageFormat:
    """`kind` is fp8 or nf4; `gemm` the precision of an NF4 weight's products, bf16 (that of training) or fp8."""

    kind: str
    gemm: str = "bf16"

    def make(self, out_features: int, in_features: int, *, device: torch.device, **cut: Any) -> Stored:
        """Room for a weight [out, in] of this rank; `cut` as in `Stored`."""
        if self.kind == "fp8":
            return StoredFp8(out_features, in_features, device=device, **cut)
        kind = StoredNf4ForFp8 if self.gemm == "fp8" else StoredNf4
        return kind(out_features, in_features, device=device, **cut)

# SPDX-License-Identifier: Apache-2.0
"""The GPUs a plan can be made for, in their vendor's numbers but for memory that was read off a card."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from lora_megatron.errors import ConfigError

NODE = 8
"""GPUs that a fast link joins."""


@dataclass(frozen=True)
class Gpu:
    """Data sheet values of one GPU; rates are dense, without sparsity.

    Memory is what programs can have, where that was read off a card: an H200, sold as 141 GB, gives them 139.8 GiB.
    """

    name: str
    memory_gb: float
    tflops_16bit: float
    """bf16, fp16 on a V100."""
    tflops_fp32: float
    """Without TF32, as torch multiplies fp32 by default."""
    tflops_fp8: float | None
    """None where there is no such product."""
    bandwidth_gbs: float
    """Of its memory."""
    link_gbs: float
    """To the GPUs of its node, one direction."""
    network_gbs: float
    """To other nodes, one direction; of the usual machine with this GPU, not of the GPU."""

    @property
    def memory(self) -> int:
        """Bytes."""
        return round(self.memory_gb * 1e9)


_GPUS = (
    Gpu("v100", 32, 125, 15.7, None, 900, 150, 12.5),
    Gpu("a100", 80, 312, 19.5, None, 2039, 300, 25),
    Gpu("a100-40gb", 40, 312, 19.5, None, 1555, 300, 25),
    Gpu("l40s", 48, 362, 91.6, 733, 864, 32, 25),
    Gpu("h100", 80, 989, 67, 1979, 3350, 450, 50),
    Gpu("h200", 150, 989, 67, 1979, 4800, 450, 50),
    Gpu("b200", 180, 2250, 75, 4500, 8000, 900, 50),
)
GPUS = {gpu.name: gpu for gpu in _GPUS}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name; raises ConfigError naming the nearest."""
    gpu = GPUS.get(name.lower())
    if gpu is None:
        nearest = difflib.get_close_matches(name.lower(), GPUS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"unknown --gpu {name!r}: did you mean {nearest}? (valid: {', '.join(GPUS)})")
    return gpu

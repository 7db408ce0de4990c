# SPDX-License-Identifier: Apache-2.0
"""`train.cuda_graph`: the optimizer's step as a CUDA graph beside that of the passes (`training.cuda_graph`).

For some hundred small factors the norm, clipping, AdamW and the copies into bf16 parameters are less work for a GPU
than for its host, which walks over them. A graph of them is one launch, after which the host reads the norm.

The graph holds what an eager step of `training.adamw_pass` does, so results are the same to the bit. All that it reads
and writes lies in one place for the life of the optimizer: gradients in DDP's buffers, masters and parameters, and the
moments, into which a loaded state is copied; the learning rate and the number of tokens are filled in before each
launch. Other optimizers go on eagerly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_megatron.training.adamw_pass import AdamWPass
from lora_megatron.training.cuda_graph import WARM_UP_STEPS, record


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    norm: Tensor
    """Of the last launch, fp64 []."""


class OptimizerGraph:
    """The graph of an optimizer's step. It needs a CUDA device from the step on that it captures."""

    def __init__(self, work: AdamWPass) -> None:
        self._work = work
        self._steps = 0
        self._captured: _Captured | None = None

    def run(self) -> Tensor:
        """As `AdamWPass.run`. The first steps are eager ones: they compile the kernel, make AdamW's state and
        communicators, and find gradients where they will stay."""
        self._steps += 1
        if self._captured is None and self._steps <= WARM_UP_STEPS:
            return self._work.run()
        if self._captured is None:
            self._captured = _Captured(*record(self._work.run))
        self._captured.graph.replay()  # on the current stream, which has waited for the passes (`StepGraph`)
        return self._captured.norm

    def release(self) -> None:
        """Give the graph's memory back; steps after this warm up again."""
        self._captured = None
        self._steps = 0

# SPDX-License-Identifier: Apache-2.0
"""Marks of tests that need GPUs; what they run on is the fixture `nccl`."""

from __future__ import annotations

import pytest
import torch

GPUS = torch.cuda.device_count()
one_gpu = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 1, reason="needs a CUDA device")]
two_gpus = [pytest.mark.multigpu, pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")]

# SPDX-License-Identifier: Apache-2.0
"""Captured steps equal eager ones to the bit however late the work is that they do aside (`layers.aside`).

    python -m pytest tests/training/test_aside_gpu.py -m "gpu or multigpu"

Streams aside sleep before each piece of work, longer than any product here takes: whoever did not wait for it would
read what was there before. (`tests/layers/test_aside_in_training.py` has the waits of an exchange on CPUs.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch

from lora_megatron.layers.aside import Aside, Work
from tests.gpus import one_gpu, two_gpus
from tests.pool import Pool
from tests.training.test_cuda_graph_gpu import CASES, TWO_GPUS, compare

DO_ASIDE = Aside.do
SLEEP: Callable[[int], None] = torch.cuda._sleep  # torch's own tests have it; its type is not written down


def slowly(self: Aside, work: Work) -> None:
    """In the place of `Aside.do`: some 1 ms before the work."""
    DO_ASIDE(self, lambda: (SLEEP(2_000_000), work()))


def compare_late(case: dict[str, Any]) -> list[str]:
    """What is wrong on this rank."""
    with patch.object(Aside, "do", slowly):
        return compare(case)


@pytest.mark.parametrize("case", [pytest.param(name, marks=one_gpu) for name in ("bf16", "fp8")])
def test_on_one_gpu(nccl: Pool, case: str) -> None:
    assert nccl.run(1, compare_late, case=CASES[case]) == [[]]


@pytest.mark.parametrize("case", [pytest.param(name, marks=two_gpus) for name in TWO_GPUS if "overlap" in name])
def test_on_two_gpus(nccl: Pool, case: str) -> None:
    assert nccl.run(2, compare_late, case=TWO_GPUS[case]) == [[], []]

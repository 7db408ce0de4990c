# SPDX-License-Identifier: Apache-2.0
"""The optimizer's step as a CUDA graph gives the eager step's norms, parameters and state to the bit.

    python -m pytest tests/training/test_optimizer_graph_gpu.py -m "gpu or multigpu" -s

Two eager steps, the capture, and replays: with norms that are not finite, a state loaded from before, and a graph that
is released and captured again. Each step has gradients and a learning rate of its own. With the passes' graph before it
the same step is compared in `test_cuda_graph_gpu`, with what is done here without a capture in `test_optimizer_graph`.
"""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest

from lora_megatron.parallel.groups import Layout
from lora_megatron.training.adamw_pass import AdamWPass
from lora_megatron.training.cuda_graph import WARM_UP_STEPS
from lora_megatron.training.optimizer import MegatronAdamW
from tests.gpus import one_gpu, two_gpus
from tests.pool import Pool
from tests.training.optimizer_course import CLIP, LOADED, compare


def compare_here(**how: Any) -> list[str]:
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")  # as `join_world` does, which a pool does without
    return compare(**how)


@pytest.mark.parametrize("clip", [pytest.param(clip, marks=one_gpu) for clip in (0.0, CLIP, 1e9)])
def test_a_graph_equals_eager_steps(nccl: Pool, clip: float) -> None:
    assert nccl.run(1, compare_here, layout=Layout(), clip=clip) == [[]]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(Layout(tensor=2, sequence=True), marks=two_gpus, id="tp2-sp"),
        pytest.param(Layout(pipeline=2, virtual_pipeline=2), marks=two_gpus, id="chunks"),
        pytest.param(Layout(), marks=two_gpus, id="dp2"),
    ],
)
def test_graphs_of_two_gpus_equal_eager_steps(nccl: Pool, layout: Layout) -> None:
    assert nccl.run(2, compare_here, layout=layout) == [[], []]


def load_elsewhere(optimizer: MegatronAdamW, names: Any, read: Any, *, step: int) -> None:
    """Into tensors that no graph knows."""
    for each in optimizer._optimizers():
        each.optimizer.state.clear()
    optimizer.load_named_state(names, read, step)


@pytest.mark.parametrize("_", [pytest.param(None, marks=one_gpu)])
def test_a_state_that_lies_elsewhere_would_be_noticed(nccl: Pool, _: None) -> None:
    (found,) = nccl.run(1, compare_here, layout=Layout(), load=load_elsewhere)
    assert [text for text in found if text.startswith(f"step {LOADED + 1}:")]
    assert not [text for text in found if text.startswith(tuple(f"step {step}:" for step in range(LOADED + 1)))]


def compare_with_one_rate() -> list[str]:
    """From the graph on the learning rate stays that of the first step."""
    fill, rates = AdamWPass.fill, list[float]()

    def fill_once(self: AdamWPass, lr: float, tokens: int) -> None:
        rates.append(lr)
        fill(self, rates[0] if len(rates) > WARM_UP_STEPS else lr, tokens)

    return compare_here(layout=Layout(), broken=mock.patch.object(AdamWPass, "fill", fill_once))


@pytest.mark.parametrize("_", [pytest.param(None, marks=one_gpu)])
def test_a_rate_that_stays_would_be_noticed(nccl: Pool, _: None) -> None:
    (found,) = nccl.run(1, compare_with_one_rate)
    assert [text for text in found if text.startswith("step 2:")]
    assert not [text for text in found if text.startswith(("step 0:", "step 1:"))]

# SPDX-License-Identifier: Apache-2.0
"""Models whose layers leave the update of a row layer to the addition of the residual train as they do without that.

On a CPU, where nothing is rounded otherwise, to the bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from torch import Tensor

from lora_megatron.layers import residual, row
from lora_megatron.layers.low_rank import add_low_rank
from lora_megatron.layers.rebuilt import taken_over
from lora_megatron.model import build, spec
from tests.pool import Pool
from tests.twin import Experiment, Record, train_twin


@contextlib.contextmanager
def hidden_dropout(probability: float) -> Iterator[None]:
    original = build.megatron_config

    def megatron_config(*args: Any) -> Any:
        config = original(*args)
        config.hidden_dropout = probability
        return config

    with mock.patch.object(build, "megatron_config", megatron_config):
        yield


def train_both(experiment: Experiment, probability: float) -> tuple[Record | None, Record | None, tuple[int, int]]:
    """The model as it is, and with updates that its row layers add; and how many the first left to the residual's
    addition, and how many of these that added in one pass."""

    def added(layer: Any, output: Tensor, bias: Tensor | None, u: Tensor) -> tuple[Tensor, Tensor | None]:
        return add_low_rank(output, layer.low_rank_update(u)), bias

    def megatrons(training: bool, fused: bool) -> Any:
        # In both the norm adds the residual's gradient: where branches are parallel, sums of three have an order.
        add = get_bias_dropout_add(training, fused)
        return lambda pair, kept, probability: add(pair, taken_over(kept), probability)

    with hidden_dropout(probability):
        torch.manual_seed(0)
        with mock.patch.object(residual, "add_low_rank", side_effect=add_low_rank) as asked:
            ours = train_twin(experiment)
        torch.manual_seed(0)
        with (
            mock.patch.object(row.LoraRowParallelLinear, "with_update", added),
            mock.patch.object(spec, "get_residual_add", megatrons),
        ):
            at_once = sum(call.kwargs.get("residual") is not None for call in asked.call_args_list)
            return ours, train_twin(experiment), (asked.call_count, at_once)


GPT = Experiment(model={"preset": "tiny", "num_layers": 2}, steps=2)
SIDE_BY_SIDE = replace(GPT, model={**GPT.model, "position": "rope", "parallel_residual": True})
MODELS = {
    "gpt": GPT,
    "llama": replace(GPT, model={"preset": "tiny-llama", "num_layers": 2}),
    "side by side": SIDE_BY_SIDE,
    "bf16": replace(GPT, precision="bf16"),
    "recomputed": replace(GPT, recompute="full"),
    "side by side, recomputed": replace(SIDE_BY_SIDE, recompute="full"),
}


@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_what_it_was_with_updates_added_by_its_layers(pool: Pool, name: str, probability: float) -> None:
    """To the bit: losses, gradients and parameters. So each update is applied, and once, as B is not zero."""
    experiment = MODELS[name]
    ours, theirs, times = pool.run(1, train_both, experiment=experiment, probability=probability)[0]
    # Two a layer and microbatch, of an evaluation and of each step; recomputation makes two forward passes of those.
    evaluated = 2 * 2 * experiment.global_batch_size
    trained = evaluated * experiment.steps * (1 + (experiment.recompute == "full"))
    assert times == (evaluated + trained, evaluated + (0 if probability else trained))
    assert (ours["eval"], ours["loss"]) == (theirs["eval"], theirs["loss"])
    for kind in ("grads", "values"):
        for got, want in zip(ours[kind], theirs[kind], strict=True):
            assert list(got) == list(want)
            assert [one for one in want if not torch.equal(got[one], want[one])] == []

# SPDX-License-Identifier: Apache-2.0
"""Models whose norms add the residual's gradient to their own train as they do where autograd adds the two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lora_megatron.layers import norm, rebuilt
from tests.pool import Pool
from tests.twin import Experiment, Record, train_twin


def train_both(experiment: Experiment) -> tuple[Record | None, Record | None, int]:
    """The model as it is, and with norms that hand nothing on; and how often a norm of the first got two gradients."""
    original: Callable[..., Any] = rebuilt._RebuiltBesideResidual.backward
    both = list[bool]()

    def noted(ctx: Any, *grads: Tensor | None) -> Any:
        both.append(None not in grads)
        return original(ctx, *grads)

    with mock.patch.object(rebuilt._RebuiltBesideResidual, "backward", staticmethod(noted)):
        ours = train_twin(experiment)
    with mock.patch.object(norm, "rebuilt_beside_residual", rebuilt.rebuilt):
        theirs = train_twin(experiment)
    assert all(both)
    return ours, theirs, len(both)


GPT = Experiment(model={"preset": "tiny", "num_layers": 2}, steps=2)
LLAMA = replace(GPT, model={"preset": "tiny-llama", "num_layers": 2})
SIDE_BY_SIDE = replace(GPT, model={**GPT.model, "position": "rope", "parallel_residual": True})
# How many norms read what needs a gradient and hand it on: not the first behind frozen embeddings, unless it is part of
# what is recomputed, whose input megatron-core gives a gradient; nor the second of parallel branches.
MODELS = {
    "gpt": (GPT, 3),
    "llama": (LLAMA, 3),
    "bf16": (replace(GPT, precision="bf16"), 3),
    "recomputed": (replace(GPT, recompute="full"), 4),
    "recomputed together": (replace(LLAMA, recompute="full", recompute_unit=2), 4),
    "recomputed MLPs": (replace(LLAMA, recompute="selective", recompute_modules=("core_attn", "mlp")), 3),
    "all trained": (replace(GPT, method={"name": "full"}), 4),
    "all trained, recomputed": (replace(LLAMA, method={"name": "full"}, recompute="full"), 4),
    "biases": (replace(GPT, method={"name": "bitfit"}), 3),
    "last of four layers": (replace(GPT, model={"preset": "tiny", "num_layers": 4}, method={"name": "ft_top2"}), 3),
    "side by side": (SIDE_BY_SIDE, 1),
    "side by side, recomputed": (replace(SIDE_BY_SIDE, recompute="full"), 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_what_it_was_when_autograd_added(pool: Pool, name: str) -> None:
    """To the bit. Where branches are parallel, three gradients are summed in another order: then within rounding."""
    experiment, norms = MODELS[name]
    ours, theirs, times = pool.run(1, train_both, experiment=experiment)[0]
    assert times == norms * experiment.steps * experiment.global_batch_size
    assert (ours["eval"], ours["loss"][0]) == (theirs["eval"], theirs["loss"][0])
    for kind in ("grads", "values"):
        for got, want in zip(ours[kind], theirs[kind], strict=True):
            assert list(got) == list(want)
            if name.startswith("side by side"):
                off = {one: float((got[one] - t).norm() / t.norm()) for one, t in want.items()}
                assert max(off.values()) < 1e-5, off
            else:
                assert [one for one in want if not torch.equal(got[one], want[one])] == []

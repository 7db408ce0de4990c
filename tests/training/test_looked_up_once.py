# SPDX-License-Identifier: Apache-2.0
"""An optimizer that keeps its lists takes the very steps of one that makes them anew, and makes them once."""

from __future__ import annotations

import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params as OfHalfPrecision

from lora_megatron.config import OptimizerSection
from lora_megatron.model.names import named_parameters
from lora_megatron.parallel.groups import build_mesh
from lora_megatron.training import looked_up_once
from lora_megatron.training import optimizer as module
from lora_megatron.training.choose_optimizer import choose_optimizer
from lora_megatron.training.optimizer import MegatronAdamW, trained, wrap_ddp
from lora_megatron.training.step import run_microbatches
from tests.pool import Pool
from tests.twin import Experiment, build_chunks, microbatch

STEPS, BAD, CLIP = 5, 3, 0.5
Steps = tuple[list[float], dict[str, torch.Tensor], int, list[int]]


def steps(*, keep: bool, reload: bool = False) -> Steps:
    """(gradient norms, state at the end, times that gradients were looked up, bytes of the state after each step);
    the gradients of one step are not finite.

    reload: after the second step take the state from a copy of it, as from a checkpoint.
    """
    experiment = Experiment(precision="bf16")
    build_mesh(experiment.layout, seed=1, timeout_minutes=2)
    chunks, _ = build_chunks(experiment)
    ddp = wrap_ddp(chunks, sharding="none", precision="bf16")
    names, norms, sizes = trained(named_parameters(chunks)), list[float](), list[int]()
    look_up = mock.Mock(side_effect=OfHalfPrecision._copy_model_grads_to_main_grads)
    with (
        mock.patch.object(OfHalfPrecision, "_copy_model_grads_to_main_grads", lambda self: look_up(self)),
        mock.patch.object(module, "look_up_once", module.look_up_once if keep else lambda optimizer: None),
    ):
        optimizer = choose_optimizer(ddp, OptimizerSection(lr=1e-2, clip_grad=CLIP), precision="bf16")
        assert isinstance(optimizer, MegatronAdamW)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = run_microbatches(ddp, [microbatch(experiment, step)])
            if step == BAD:
                next(iter(names)).main_grad.fill_(math.inf)
            norms.append(optimizer.step(loss.tokens))
            sizes.append(optimizer.state_bytes())
            if reload and step == 1:
                copy = {name: value.clone() for name, value in optimizer.named_state(names)}
                optimizer.load_named_state(names, copy.__getitem__, step=2)
    return norms, dict(optimizer.named_state(names)), look_up.call_count, sizes


@pytest.fixture(scope="module")
def both(pool: Pool) -> list[Steps]:
    return [pool.run(1, steps, keep=keep)[0] for keep in (True, False)]


def test_steps_are_the_same_to_the_bit(both: list[Steps]) -> None:
    (norms, state, _, _), (other_norms, other_state, _, _) = both
    assert norms == other_norms
    assert [math.isfinite(norm) for norm in norms] == [step != BAD for step in range(STEPS)]
    assert max(filter(math.isfinite, norms)) > CLIP
    assert state.keys() == other_state.keys()
    assert [name for name, value in state.items() if not torch.equal(value, other_state[name])] == []


def test_a_state_that_is_loaded_in_between_goes_on(pool: Pool, both: list[Steps]) -> None:
    norms, state, calls, _ = pool.run(1, steps, keep=True, reload=True)[0]
    assert (norms, calls) == (both[1][0], 1)
    assert [name for name, value in state.items() if not torch.equal(value, both[1][1][name])] == []


def test_fp32_parameters_beside_those_of_bf16_keep_megatron_cores_own_steps() -> None:
    """Their gradients are set and taken away in each step."""
    groups = {"fp32_from_float16_groups": [[]], "float16_groups": [[]], "fp32_from_fp32_groups": [[object()]]}
    optimizer = SimpleNamespace(**groups)
    looked_up_once.look_up_once(optimizer)
    assert vars(optimizer) == groups


def test_lists_are_made_once(both: list[Steps]) -> None:
    assert [calls for _, _, calls, _ in both] == [1, STEPS]


def test_the_state_is_counted_when_it_is_there(both: list[Steps]) -> None:
    _, state, _, sizes = both[0]
    assert set(sizes) == {sum(value.nbytes for value in state.values())}

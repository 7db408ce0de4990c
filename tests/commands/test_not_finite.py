# SPDX-License-Identifier: Apache-2.0
"""A loss or a gradient that is not finite stops all ranks, changes nothing, and says where it came from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lora_megatron.commands import train as command
from lora_megatron.training import loop
from lora_megatron.training.loop import Trainer
from tests.commands.runs import Outcome, Tree, attempt, checkpoint_of, log_of, losses_of, make_tree, names_in, status_of
from tests.pool import Pool

BAD_STEP = 5


@dataclass(frozen=True)
class Fault:
    """NaN in the output (the loss, on the last stage) or in one parameter's gradient of one rank at step 5."""

    where: str
    rank: int


def _poison(trainer: Trainer, fault: Fault) -> None:
    """Hook the fault into this rank's model: into a gradient before it is reduced, or into the logits."""

    def spoil(tensor: Tensor) -> Tensor:
        return tensor * math.nan if trainer.step + 1 == BAD_STEP and torch.is_grad_enabled() else tensor

    module = trainer.chunks[0].module
    if fault.where == "gradient":
        next(p for p in module.parameters() if p.requires_grad).register_hook(
            lambda gradient: gradient * math.nan if trainer.step + 1 == BAD_STEP else gradient
        )
    else:
        module.register_forward_hook(lambda module, inputs, output: spoil(output))


def train_with(tree: Tree, fault: Fault) -> tuple[Outcome, bool]:
    """Train with the fault; also whether the step it hit left every trained parameter and moment as it was."""
    build, step, touched = command._build_trainer, loop.train_step, []

    def build_trainer(*arguments: Any) -> Trainer:
        trainer = build(*arguments)
        if dist.get_rank() == fault.rank:
            _poison(trainer, fault)
        return trainer

    def train_step(trainer: Trainer) -> Any:
        before = _state(trainer)
        result = step(trainer)
        same = all(torch.equal(one, other) for one, other in zip(before, _state(trainer), strict=True))
        touched.append((trainer.step + 1, not same))
        return result

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(command, "_build_trainer", build_trainer)
        patched.setattr(loop, "train_step", train_step)
        outcome = attempt(tree)
    assert touched[-1][0] == BAD_STEP
    assert all(changed for number, changed in touched[:-1])
    return outcome, not touched[-1][1]


def _state(trainer: Trainer) -> list[Tensor]:
    names = {
        p: str(index) for index, p in enumerate(p for c in trainer.chunks for p in c.parameters() if p.requires_grad)
    }
    values = [parameter.detach().clone() for parameter in names]
    return values + [tensor.clone() for _, tensor in trainer.optimizer.named_state(names)]


@pytest.mark.parametrize(
    ("parallel", "optimizer", "world", "fault", "names"),
    [
        ({}, {}, 1, Fault("loss", 0), "loss is nan at step 5 (on rank 0)"),
        ({}, {}, 2, Fault("loss", 1), "loss is nan at step 5 (on rank 1)"),
        ({}, {"sharding": "megatron"}, 2, Fault("gradient", 1), "gradient norm is nan at step 5 (on rank"),
        ({"tensor": 2}, {}, 2, Fault("gradient", 1), "gradient norm is nan at step 5 (on rank 1)"),
        ({"pipeline": 2}, {}, 2, Fault("loss", 1), "loss is nan at step 5 (on rank 1)"),
        ({"pipeline": 2}, {}, 2, Fault("gradient", 0), "gradient norm is nan at step 5 (on rank 0)"),
        ({"pipeline": 2}, {}, 2, Fault("activation", 0), "loss is nan at step 5 (on rank 1)"),
    ],
    ids=str,
)
def test_all_ranks_stop_and_the_run_goes_on_from_its_last_checkpoint(
    pool: Pool,
    corpus: Path,
    tmp_path: Path,
    undisturbed: dict[int, float],
    parallel: Tree,
    optimizer: Tree,
    world: int,
    fault: Fault,
    names: str,
) -> None:
    run = tmp_path / "run"
    tree = make_tree(corpus, run, parallel=parallel, optimizer={"lr": 5e-3, **optimizer})
    answers = pool.run(world, train_with, tree=tree, fault=fault)
    assert len({outcome for outcome, _ in answers}) == 1
    outcome = answers[0][0]
    assert outcome.status == 5
    assert names in outcome.message
    assert "no update was applied and the last checkpoint is good" in outcome.message
    assert "\n" not in outcome.message
    assert all(untouched for _, untouched in answers)

    last = log_of(run)[-1]
    assert (last["step"], last["finite"]) == (BAD_STEP, False)
    assert last["grad_norm"] is None
    assert (last["loss"] is None) == ("loss is" in outcome.message)
    status = status_of(run)
    assert (status["state"], status["exit_status"], status["error"]) == ("failed", 5, outcome.message)
    assert names_in(run / "checkpoints") == ["step-00000002", "step-00000004"]
    assert not (run / "adapter").exists()

    resumed = {**tree, "run": {"dir": str(run), "resume": str(checkpoint_of(run, 4))}}
    assert pool.run(world, attempt, tree=resumed) == [Outcome()] * world
    assert losses_of(run) == pytest.approx(undisturbed, rel=1e-5)
    assert all("finite" not in line for line in log_of(run))


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the run without a fault."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert attempt(make_tree(corpus, run)) == Outcome()
    return losses_of(run)

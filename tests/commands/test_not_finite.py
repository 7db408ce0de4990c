# SPDX-License-Identifier: Apache-2.0
"""A loss, gradient or tensor to save that is not finite stops all ranks, changes nothing, and says where it is from."""

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
    assert "no update was applied" in outcome.message  # and no step was taken from the checkpoint of step 4 yet:
    assert f"known to be good is that of step 2 (run.resume={checkpoint_of(run, 2)})" in outcome.message
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


def test_the_last_checkpoint_that_is_known_to_be_good_stays(corpus: Path, tmp_path: Path) -> None:
    """With a huge learning rate step 3 ends in finite parameters that give NaN at once; step 2 must not go for them."""
    run = tmp_path / "run"
    train = {"steps": 2, "save_every": 1, "keep_checkpoints": 1, "warmup_steps": 0}
    assert attempt(make_tree(corpus, run, train=train)) == Outcome()
    diverging = make_tree(corpus, run, train={**train, "steps": 6}, optimizer={"lr": 1e30})
    outcome = attempt({**diverging, "run": {"dir": str(run), "resume": "auto"}})
    assert outcome.status == 5
    assert "at step 4" in outcome.message
    assert f"that of step 2 (run.resume={checkpoint_of(run, 2)})" in outcome.message
    assert names_in(run / "checkpoints") == ["step-00000002", "step-00000003"]
    calmer = make_tree(corpus, run, train={**train, "steps": 4})
    assert attempt({**calmer, "run": {"dir": str(run), "resume": str(checkpoint_of(run, 2))}}) == Outcome()


NOTHING_SEEN = {"data": {"validation": None}, "optimizer": {"weight_decay": 1e300}}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"optimizer": {"weight_decay": 1e300}}, "held-out loss is nan after step 1 (on rank"),
        ({"optimizer": {"lr": 1e20}, "method": {"name": "full"}}, "held-out loss is nan after step 1 (on rank"),
        (NOTHING_SEEN, "after step 1: decoder.layers."),
        ({**NOTHING_SEEN, "method": {"name": "full"}}, "after step 1: "),
    ],
    ids=["weight decay", "learning rate", "without held-out data", "without held-out data, full"],
)
@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}], ids=str)
def test_what_is_not_finite_at_the_end_is_an_error_and_never_written(
    pool: Pool, corpus: Path, tmp_path: Path, sections: Tree, words: str, parallel: Tree
) -> None:
    run = tmp_path / "run"
    tree = make_tree(corpus, run, parallel=parallel, train={"steps": 1, "warmup_steps": 0}, **sections)
    outcomes = pool.run(2, attempt, tree=tree)
    assert len(set(outcomes)) == 1
    assert outcomes[0].status == 5
    assert words in outcomes[0].message
    assert "\n" not in outcomes[0].message
    assert not {"adapter", "model"} & set(names_in(run))
    assert not (run / "checkpoints").exists() or names_in(run / "checkpoints") == []

# SPDX-License-Identifier: Apache-2.0
"""Skipped or rolled back, a run with bad samples gives, bit by bit, the losses of one whose data never held them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lora_megatron.checkpoint.folder import read_manifest
from lora_megatron.commands import train as command
from lora_megatron.errors import CheckpointError
from lora_megatron.training import loop
from lora_megatron.training.loop import Trainer
from lora_megatron.training.step import StepLoss
from lora_megatron.training.verdict import SpikeGuard
from tests.commands.runs import (
    Outcome,
    Tree,
    attempt,
    checkpoint_of,
    evaluations_of,
    log_of,
    losses_of,
    make_tree,
    names_in,
    status_of,
)
from tests.pool import Pool

BATCH = 4


@dataclass(frozen=True)
class Fault:
    """What is wrong on one rank with the global batches numbered `batches`, from 0."""

    where: str
    rank: int
    batches: tuple[int, ...]
    factor: float = math.nan


def _poison(trainer: Trainer, fault: Fault) -> None:
    """Spoil a gradient before it is reduced, or what this rank's part of the model puts out."""

    def factor() -> float:
        return fault.factor if trainer.consumed_samples // BATCH in fault.batches else 1.0

    module = trainer.chunks[0].module
    if fault.where == "gradient":
        next(p for p in module.parameters() if p.requires_grad).register_hook(lambda gradient: gradient * factor())
        return

    def spoil(module: Any, inputs: Any, output: Tensor) -> Tensor:
        return output * factor() if torch.is_grad_enabled() else output

    module.register_forward_hook(spoil)


def train_with(tree: Tree, fault: Fault) -> Outcome:
    """Train with the fault."""
    build = command._build_trainer

    def build_trainer(*arguments: Any) -> Trainer:
        trainer = build(*arguments)
        if dist.get_rank() == fault.rank:
            _poison(trainer, fault)
        return trainer

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(command, "_build_trainer", build_trainer)
        return attempt(tree)


def train_without(tree: Tree, batches: tuple[int, ...]) -> Outcome:
    """Train on the stream that does not hold these global batches."""
    original = loop.microbatches_of_step

    def microbatches_of_step(data: Any, consumed: int, size: int) -> Any:
        number = consumed // size
        for batch in sorted(batches):
            number += batch <= number
        return original(data, number * size, size)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "microbatches_of_step", microbatches_of_step)
        return attempt(tree)


def good_losses(run: Path) -> list[tuple[int, float]]:
    """Step and loss of every update, in the order of the log."""
    return [(line["step"], line["loss"]) for line in log_of(run) if "skipped" not in line]


def bad_steps(run: Path) -> list[Tree]:
    return [json.loads(line) for line in (run / "bad_steps.jsonl").read_text().splitlines()]


TP2, PP2, DP2 = {"tensor": 2}, {"pipeline": 2}, {}


@pytest.mark.parametrize(
    ("policy", "parallel", "sharding", "fault", "left_out"),
    [
        ("skip", TP2, "none", Fault("gradient", 1, (4,)), (4,)),
        ("skip", PP2, "none", Fault("activation", 0, (4, 5)), (4, 5)),
        ("skip", DP2, "megatron", Fault("loss", 1, (4,)), (4,)),
        ("skip", PP2, "none", Fault("loss", 1, (5,), factor=50.0), (5,)),
        pytest.param("rollback", TP2, "none", Fault("gradient", 0, (5,)), (4, 5), marks=pytest.mark.slow),
        ("rollback", PP2, "none", Fault("gradient", 1, (5, 7)), (4, 5, 6, 7)),
        ("rollback", DP2, "megatron", Fault("loss", 1, (5,)), (4, 5)),
        ("rollback", DP2, "none", Fault("loss", 0, (5,), factor=50.0), (4, 5)),
    ],
    ids=str,
)
def test_the_run_is_that_of_data_without_the_bad_samples(
    pool: Pool,
    corpus: Path,
    tmp_path: Path,
    policy: str,
    parallel: Tree,
    sharding: str,
    fault: Fault,
    left_out: tuple[int, ...],
) -> None:
    run, clean = tmp_path / "run", tmp_path / "clean"
    sections = {"parallel": parallel, "optimizer": {"lr": 5e-3, "sharding": sharding}}
    train = {"on_bad_step": policy, "spike_factor": 3.0, "steps": 8, "save_every": 2, "warmup_steps": 1}
    tree = make_tree(corpus, run, train=train, **sections)
    assert pool.run(2, train_with, tree=tree, fault=fault) == [Outcome()] * 2
    without = make_tree(corpus, clean, train=train, **sections)
    assert pool.run(2, train_without, tree=without, batches=left_out) == [Outcome()] * 2
    assert good_losses(run) == good_losses(clean)
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == (
        clean / "adapter" / "adapter_model.safetensors"
    ).read_bytes()

    assert [line["action"] for line in bad_steps(run)] == [policy] * len(fault.batches)
    assert [line["first_sample"] // BATCH for line in bad_steps(run)] == list(fault.batches)
    skipped = [line for line in log_of(run) if "skipped" in line]
    assert len(skipped) == (len(fault.batches) if policy == "skip" else 0)
    assert all(line["skipped"] is True for line in skipped)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("skip", "at step 6 (on rank 0), after train.max_bad_steps = 2 skipped in a row: training stopped"),
        # Back to step 4, whose next step is bad too, so to step 2, whose next step is no better.
        ("rollback", "at step 3 (on rank 0), after going back train.max_bad_steps = 2 times: training stopped"),
    ],
)
def test_what_does_not_end_ends_the_run(corpus: Path, tmp_path: Path, policy: str, words: str) -> None:
    run = tmp_path / "run"
    train = {"on_bad_step": policy, "max_bad_steps": 2, "steps": 8, "save_every": 2}
    outcome = train_with(make_tree(corpus, run, train=train), Fault("loss", 0, tuple(range(5, 100))))
    assert outcome.status == 5
    assert f"loss is nan {words}" in outcome.message
    assert [line["action"] for line in bad_steps(run)] == [policy, policy, "stop"]
    assert (status_of(run)["state"], status_of(run)["exit_status"]) == ("failed", 5)


def test_going_back_takes_the_best_of_the_abandoned_course_back(corpus: Path, tmp_path: Path) -> None:
    """The fifth evaluation is the best, of the course that is left and of the one that is followed."""
    run, losses = tmp_path / "run", iter([9.0, 5.0, 4.0, 3.0, 2.0, 1.0, 1.0, 6.0, 6.0, 6.0])
    train = {"on_bad_step": "rollback", "steps": 7, "save_every": 1, "keep_checkpoints": 9}
    tree = make_tree(corpus, run, train={**train, "eval_every": 1, "best": "loss"})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "held_out_loss", lambda *_: StepLoss(next(losses), 1))
        assert train_with(tree, Fault("loss", 0, (5,))) == Outcome()
    assert [line["step"] for line in evaluations_of(run)] == list(range(8))
    assert read_manifest(run / "best")["best"] == {"metric": "loss", "step": 5, "value": 1.0}
    file = "adapter_model.safetensors"
    assert (run / "best" / file).read_bytes() == (checkpoint_of(run, 5) / file).read_bytes()
    (left,) = (path for path in (run / "earlier_best").iterdir() if path.name.startswith("superseded-step-00000005-"))
    assert (left / file).read_bytes() != (run / "best" / file).read_bytes()


def test_there_must_be_a_checkpoint_to_go_back_to(corpus: Path, tmp_path: Path) -> None:
    train = {"on_bad_step": "rollback", "steps": 4, "save_every": 2}
    outcome = train_with(make_tree(corpus, tmp_path / "run", train=train), Fault("loss", 0, (1,)))
    assert outcome.status == 5
    assert "a bad step after step 1, and no checkpoint is known to be good" in outcome.message


def test_a_resumed_run_decides_as_one_that_went_through(corpus: Path, tmp_path: Path) -> None:
    """The spike of batch 8 is one only against the losses before the resume; batches 3 and 7 are skipped around it."""
    sections = {"optimizer": {"lr": 5e-3}}
    train = {"on_bad_step": "skip", "spike_factor": 3.0, "max_bad_steps": 2, "save_every": 3, "schedule": "constant"}
    runs = {}
    for name, stops in (("through", (9,)), ("resumed", (6, 9))):
        runs[name] = tmp_path / name
        for steps in stops:
            tree = make_tree(corpus, runs[name], train={**train, "steps": steps}, **sections)
            tree["run"]["resume"] = "auto" if steps != stops[0] else "never"
            assert train_with(tree, Fault("loss", 0, (3, 7, 8), factor=50.0)) == Outcome()
    assert good_losses(runs["resumed"]) == good_losses(runs["through"])
    assert losses_of(runs["resumed"]) == losses_of(runs["through"])
    assert bad_steps(runs["resumed"]) == bad_steps(runs["through"])
    # Batch 3 comes when fewer than five losses are known: it is taken for what it is worth.
    assert [line["first_sample"] // BATCH for line in bad_steps(runs["through"])] == [7, 8]
    assert names_in(runs["through"] / "checkpoints") == ["step-00000006", "step-00000009"]


def test_what_is_dropped_by_a_resume_is_met_again(corpus: Path, tmp_path: Path) -> None:
    """Ended after it went back and before the next checkpoint, a run goes back once more, and counts it once."""
    run, through = tmp_path / "run", tmp_path / "through"
    fault = Fault("loss", 0, (5,))
    train = {"on_bad_step": "rollback", "max_bad_steps": 1, "steps": 6, "save_every": 2}
    assert train_with(make_tree(corpus, through, train=train), fault) == Outcome()
    tree = make_tree(corpus, run, train=train)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "_evaluation_is_due", _end_at_step_5_after_going_back)
        assert train_with(tree, fault) == Outcome(4, "the end")
    assert len(bad_steps(run)) == 1
    tree["run"]["resume"] = "auto"
    assert train_with(tree, fault) == Outcome()
    assert good_losses(run) == good_losses(through)
    assert bad_steps(run) == bad_steps(through)


def _end_at_step_5_after_going_back(trainer: Trainer) -> bool:
    if trainer.step == 5 and trainer.bad.rollbacks:
        raise CheckpointError("the end")
    return False


def test_a_spike_is_measured_against_the_last_twenty_good_losses() -> None:
    guard = SpikeGuard(2.0)
    assert guard.complaint(1e9) == ""  # nothing to measure against yet
    guard.restart([100.0] * 5 + [1.0] * 20)
    assert guard.complaint(2.0) == ""
    assert "loss is 2.001, more than train.spike_factor = 2 times 1" in guard.complaint(2.001)
    assert SpikeGuard(0.0).complaint(1e9) == ""

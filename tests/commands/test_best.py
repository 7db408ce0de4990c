# SPDX-License-Identifier: Apache-2.0
"""The best evaluation of a run is kept: by step and value, on every layout, and over any resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from data_prep.writer import DatasetWriter
from lora_megatron.checkpoint.folder import read_manifest, write_manifest
from lora_megatron.commands import train
from lora_megatron.parallel import groups
from lora_megatron.training import loop
from lora_megatron.training.selection import Best, Selection
from lora_megatron.training.step import StepLoss
from tests.commands.runs import (
    Outcome,
    Tree,
    attempt,
    attempt_each,
    checkpoint_of,
    evaluations_of,
    losses_of,
    make_tree,
    names_in,
    nothing_begun,
)
from tests.pool import Pool

STEPS = 8
# Held-out losses by step: best at 2, at 5, and at 7; before training and at 8 it would be, if that counted.
LOSSES = [0.5, 4.0, 3.0, 3.5, 3.0, 2.0, 2.5, 1.0, 1.0]


def best_tree(corpus: Path, folder: Path, /, **sections: Tree) -> Tree:
    train = {"steps": STEPS, "eval_every": 1, "save_every": 1, "keep_checkpoints": 3, "best": "loss"}
    return make_tree(corpus, folder, **{**sections, "train": {**train, **sections.get("train", {})}})


def attempt_with_losses(tree: Tree, losses: list[float], stop_after: int | None = None) -> Outcome:
    """A run whose held-out loss after step n is said to be losses[n]; killed after the save of step `stop_after`."""
    steps = _Steps(losses)
    with patch.object(loop, "held_out_loss", steps.loss), patch.object(loop, "evaluate", steps.evaluate):
        if stop_after is None:
            return attempt(tree)
        with patch.object(loop, "_save", steps.dying_after(stop_after)), pytest.raises(_Killed):
            attempt(tree)
        groups.stop()
        return Outcome()


class _Killed(BaseException):
    """No handler of the run's own makes anything of it."""


class _Steps:
    """`loop` with a held-out loss that depends on the step alone."""

    def __init__(self, losses: list[float]) -> None:
        self.losses, self.step = losses, 0
        self._evaluate, self._save = loop.evaluate, loop._save

    def evaluate(self, trainer: Any, callbacks: Any) -> None:
        self.step = trainer.step
        self._evaluate(trainer, callbacks)

    def loss(self, *_: Any) -> StepLoss:
        return StepLoss(self.losses[self.step], 1)

    def dying_after(self, step: int) -> Any:
        def save(trainer: Any, callbacks: Any) -> None:
            self._save(trainer, callbacks)
            if trainer.step == step:
                raise _Killed

        return save


def what_is_best(run: Path) -> Tree:
    return read_manifest(run / "best")["best"]


def tensors(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    tree = best_tree(corpus, run, train={"keep_checkpoints": STEPS})
    assert attempt_with_losses(tree, LOSSES) == Outcome()
    return run


def test_the_lowest_loss_after_a_step_is_kept(straight: Path) -> None:
    assert what_is_best(straight) == {"metric": "loss", "step": 7, "value": 1.0}  # step 8 is as good, and later
    assert tensors(straight / "best") == tensors(checkpoint_of(straight, 7))
    assert tensors(straight / "adapter") == tensors(checkpoint_of(straight, 8)) != tensors(straight / "best")
    assert json.loads((straight / "report.json").read_text())["best"] == {"by": "loss", "step": 7, "value": 1.0}
    assert "loss 1.0000 after step 7" in (straight / "report.md").read_text()


def test_what_a_checkpoint_needs_is_kept_beside_it(straight: Path, corpus: Path, tmp_path: Path) -> None:
    """All checkpoints are there, so all that were the best at one; with three, only those of steps 6 and later."""
    assert names_in(straight / "earlier_best") == ["step-00000001", "step-00000002", "step-00000005"]
    assert attempt_with_losses(best_tree(corpus, tmp_path / "run"), LOSSES) == Outcome()
    assert names_in(tmp_path / "run" / "earlier_best") == ["step-00000005"]


@pytest.mark.parametrize("killed_after", [1, 4, 5, 6, 7])
def test_a_run_that_was_killed_keeps_the_best(straight: Path, corpus: Path, tmp_path: Path, killed_after: int) -> None:
    tree = best_tree(corpus, tmp_path / "run", run={"dir": str(tmp_path / "run"), "resume": "auto"})
    attempt_with_losses(tree, LOSSES, stop_after=killed_after)
    assert attempt_with_losses(tree, LOSSES) == Outcome()
    assert what_is_best(tmp_path / "run") == what_is_best(straight)
    assert tensors(tmp_path / "run" / "best") == tensors(straight / "best")
    assert evaluations_of(tmp_path / "run") == evaluations_of(straight)


@pytest.mark.parametrize(("step", "is_best"), [(1, 1), (4, 2), (6, 5), (7, 7)])
def test_going_back_brings_the_best_of_that_step_back(
    straight: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], step: int, is_best: int
) -> None:
    """Nothing after it is any better, so it must be the one that was displaced."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    tree = best_tree(corpus, run, run={"dir": str(run), "resume": str(checkpoint_of(run, step))})
    assert attempt_with_losses(tree, LOSSES[: step + 1] + [9.0] * (STEPS - step)) == Outcome()
    assert what_is_best(run) == {"metric": "loss", "step": is_best, "value": LOSSES[is_best]}
    assert tensors(run / "best") == tensors(checkpoint_of(straight, is_best))
    said = capsys.readouterr().err
    assert f"best is of step 7, and the run goes on from step {step}: renamed to" in said or step == 7


def test_a_kill_between_the_two_renames_loses_nothing(straight: Path, corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / "best").rename(run / "earlier_best" / "step-00000007")
    tree = best_tree(corpus, run, run={"dir": str(run), "resume": "auto"})
    assert attempt_with_losses(tree, LOSSES) == Outcome()
    assert what_is_best(run)["step"] == 7
    assert tensors(run / "best") == tensors(straight / "best")


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_every_layout_chooses_the_same(pool: Pool, corpus: Path, tmp_path: Path, method: str) -> None:
    """By the true losses: the learning rate is so high that the last is not the best."""
    sections: Tree = {"method": {"name": method}, "optimizer": {"lr": 0.03}, "train": {"save_every": 0}}
    layouts: Tree = {"tp2": {"tensor": 2}, "pp2": {"pipeline": 2}, "dp2": {}}
    trees = [best_tree(corpus, tmp_path / name, parallel=layout, **sections) for name, layout in layouts.items()]
    assert attempt(best_tree(corpus, tmp_path / "one", **sections)) == Outcome()
    outcomes = pool.run(2, attempt_each, trees=trees, store=str(tmp_path / "store"))
    assert outcomes == [[Outcome()] * len(trees)] * 2
    found = {}
    for name in ("one", *layouts):
        run = tmp_path / name
        losses = {line["step"]: line["held_out_loss"] for line in evaluations_of(run) if line["step"]}
        found[name] = what_is_best(run)
        assert found[name]["value"] == min(losses.values()) == losses[found[name]["step"]]
        assert read_manifest(run / "best")["kind"] == ("adapter" if method == "lora" else "model")
    steps = {what["step"] for what in found.values()}
    assert len(steps) == 1
    assert steps < set(range(1, STEPS)), "one that could be missed"
    for what in found.values():
        assert what["value"] == pytest.approx(found["one"]["value"], rel=1e-4)


def test_a_metric_is_taken_from_the_model_and_logged(corpus: Path, tmp_path: Path) -> None:
    """Any function of the chunks, here their number of calls away from 3; higher is better."""
    values = iter([9.0, 1.0, 5.0, 3.0, float("nan")])
    chosen = Selection("some.metric", higher_is_better=True, measure=lambda chunks: next(values) * len(chunks))
    tree = best_tree(corpus, tmp_path / "run", train={"steps": 4})
    with patch.object(train, "open_selection", lambda config, tokenizer: chosen):
        assert attempt(tree) == Outcome()
    assert [line["some.metric"] for line in evaluations_of(tmp_path / "run")] == [9.0, 1.0, 5.0, 3.0, None]
    assert (what_is_best(tmp_path / "run")["step"], what_is_best(tmp_path / "run")["value"]) == (2, 5.0)


def labelled(folder: Path) -> Path:
    """A corpus whose labels training learns in a few steps: one in training, of two in validation the commoner."""
    with DatasetWriter(folder, preparer="test", options={}) as writer:
        for name, count in (("train", 24), ("validation", 12)):
            with writer.split(name) as split:
                for row in range(count):
                    label = "entailment" if name == "train" or row < 7 else "neutral"
                    split.write(id=str(row), context=f"{label[0]}{row % 7}", target=label, references=[label])
    return folder


@pytest.mark.slow
def test_a_tasks_metric_chooses_the_same_on_every_layout(pool: Pool, tmp_path: Path) -> None:
    """Rows are answered by the model in training, which goes on as if they had not been."""
    corpus = labelled(tmp_path / "labelled")
    sections: Tree = {"method": {"name": "full"}, "optimizer": {"lr": 0.01}}
    train = {"save_every": 0, "eval_every": 3, "steps": 12, "schedule": "constant", "warmup_steps": 0}
    layouts: Tree = {"tp2": {"tensor": 2}, "pp2": {"pipeline": 2}}
    by_accuracy = {**sections, "train": {**train, "best": "mnli.accuracy"}}
    trees = [best_tree(corpus, tmp_path / name, parallel=layout, **by_accuracy) for name, layout in layouts.items()]
    assert attempt(best_tree(corpus, tmp_path / "one", **by_accuracy)) == Outcome()
    assert attempt(best_tree(corpus, tmp_path / "by-loss", **sections, train=train)) == Outcome()
    outcomes = pool.run(2, attempt_each, trees=trees, store=str(tmp_path / "store"))
    assert outcomes == [[Outcome()] * len(trees)] * 2
    assert losses_of(tmp_path / "one") == losses_of(tmp_path / "by-loss")
    assert what_is_best(tmp_path / "by-loss")["step"] == 12
    for name in ("one", *layouts):
        found = {line["step"]: line["mnli.accuracy"] for line in evaluations_of(tmp_path / name)}
        assert found == pytest.approx({0: 500 / 12, 3: 500 / 12, 6: 700 / 12, 9: 700 / 12, 12: 700 / 12})
        assert what_is_best(tmp_path / name) == {"metric": "mnli.accuracy", "step": 6, "value": found[6]}
        assert read_manifest(tmp_path / name / "best")["kind"] == "model"


def test_decoding_the_validation_rows_shows_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lora_megatron.measure.rows_progress.SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("lora_megatron.evaluation.answering.SEQUENCES_AT_ONCE", 15)  # five rows of three labels
    train = {"save_every": 0, "eval_every": 1, "steps": 1, "best": "mnli.accuracy"}
    tree = best_tree(labelled(tmp_path / "labelled"), tmp_path / "run", train=train)
    assert attempt(tree) == Outcome()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mnli.accuracy  ")]
    assert [line.split("  ")[1] for line in lines] == [f"{n} of 12 rows" for n in (5, 10, 12)] * 2  # before and after


def test_a_metric_that_the_rows_cannot_give_is_refused_at_the_start(corpus: Path, tmp_path: Path) -> None:
    outcome = attempt(best_tree(corpus, tmp_path / "run", train={"best": "wikisql.execution"}))
    assert outcome.status == 2
    assert outcome.message.startswith("train.best = wikisql.execution cannot be computed here: ")
    assert nothing_begun(tmp_path / "run")


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("train", {"best": "blue"}, "train.best = blue is unknown: use one of none, loss, wikisql.logical_form"),
        ("train", {"eval_every": 0}, "train.best = loss chooses between evaluations, and train.eval_every = 0"),
        ("data", {"validation": None}, "train.best = loss needs rows to evaluate: give data.validation"),
    ],
)
def test_nothing_to_choose_by_is_refused(corpus: Path, tmp_path: Path, section: str, values: Tree, words: str) -> None:
    outcome = attempt(best_tree(corpus, tmp_path / "run", **{section: values}))
    assert outcome.status == 2
    assert words in outcome.message
    assert nothing_begun(tmp_path / "run")


def test_a_best_that_was_chosen_otherwise_is_refused(straight: Path, corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    manifest = read_manifest(run / "best")
    del manifest["files"]
    manifest["best"]["metric"] = "e2e.bleu"
    (run / "best" / "manifest.json").unlink()
    write_manifest(run / "best", manifest)
    outcome = attempt(best_tree(corpus, run, run={"dir": str(run), "resume": "auto"}))
    assert outcome.status == 2
    assert "best was chosen by train.best = e2e.bleu, and this is loss: keep that, or move it away" in outcome.message


def test_a_damaged_best_is_named(straight: Path, corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / "best" / "manifest.json").write_text("{}")
    outcome = attempt(best_tree(corpus, run, run={"dir": str(run), "resume": "auto"}))
    assert outcome.status == 4
    assert str(run / "best" / "manifest.json") in outcome.message


def test_a_value_that_is_not_finite_or_equal_improves_nothing() -> None:
    lowest, highest = Selection("loss"), Selection("x", higher_is_better=True)
    assert lowest.improves(2.0, over=None)
    assert not lowest.improves(float("nan"), over=None)
    assert not highest.improves(float("inf"), over=None)
    for value, low, high in ((1.0, True, False), (2.0, False, False), (3.0, False, True)):
        assert lowest.improves(value, over=Best(1, 2.0)) is low
        assert highest.improves(value, over=Best(1, 2.0)) is high

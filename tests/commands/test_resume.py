# SPDX-License-Identifier: Apache-2.0
"""A run that stopped goes on as if it had not: bit by bit on the same layout, to rounding on another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from lora_megatron.checkpoint.folder import read_manifest
from tests.commands.runs import (
    Outcome,
    Tree,
    attempt,
    attempt_each,
    checkpoint_of,
    held_out_of,
    log_of,
    losses_of,
    make_tree,
    names_in,
    status_of,
)
from tests.pool import Pool

STEPS = 11


def every_step(corpus: Path, run: Path, **sections: Tree) -> Tree:
    return make_tree(corpus, run, train={"steps": STEPS, "save_every": 1, "keep_checkpoints": STEPS}, **sections)


def resumed(tree: Tree, run: Path, checkpoint: Path | str) -> Tree:
    return {**tree, "run": {"dir": str(run), "resume": str(checkpoint)}}


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def check_resuming_at(steps: list[int], pool: Pool, world: int, tmp_path: Path, tree: Tree) -> None:
    """Train once without a stop, then from those of its checkpoints, each in a folder of its own."""
    straight = tmp_path / "straight"
    runs = {step: tmp_path / f"from-{step}" for step in steps}
    trees = [resumed(tree, run, checkpoint_of(straight, step)) for step, run in runs.items()]
    outcomes = pool.run(world, attempt_each, trees=[tree, *trees], store=str(tmp_path / "store"))
    assert outcomes == [[Outcome()] * (1 + len(steps))] * world
    expected = losses_of(straight)
    assert list(expected) == list(range(1, STEPS + 1))
    assert len(set(expected.values())) == STEPS
    for step, run in runs.items():
        assert losses_of(run) == {later: expected[later] for later in range(step + 1, STEPS + 1)}
        assert held_out_of(run) == held_out_of(straight)
        assert adapter_bytes(run) == adapter_bytes(straight)


@pytest.mark.parametrize(
    ("world", "sections", "steps"),
    [
        (1, {}, [1, 5]),
        pytest.param(1, {}, list(range(1, STEPS)), marks=pytest.mark.slow),
        (2, {"parallel": {"tensor": 2, "sequence": True}}, [5]),
        pytest.param(2, {"parallel": {"pipeline": 2}, "train": {"precision": "bf16"}}, [1, 10], marks=pytest.mark.slow),
        (2, {"optimizer": {"lr": 5e-3, "sharding": "megatron"}}, [1, 4]),
    ],
    ids=["alone", "alone-every", "tensor", "pipeline-bf16", "data-megatron"],
)
def test_resuming_at_every_step_gives_the_same_bits(
    pool: Pool, corpus: Path, tmp_path: Path, world: int, sections: dict[str, Tree], steps: list[int]
) -> None:
    tree = every_step(corpus, tmp_path / "straight")
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    check_resuming_at(steps, pool, world, tmp_path, tree)


@pytest.mark.parametrize(
    "method",
    [{"name": "lora"}, {"name": "full"}, {"name": "ft_top2"}, {"name": "bitfit"}],
    ids=lambda method: method["name"],
)
def test_a_run_goes_on_under_other_layouts(pool: Pool, corpus: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    tree = make_tree(corpus, tmp_path / "alone", method=method)
    (straight,) = pool.run(1, attempt, tree=tree)
    assert straight == Outcome()
    moved = {**tree, "run": {"dir": str(tmp_path / "moved"), "resume": "auto"}}
    layouts = ({"tensor": 2}, {"pipeline": 2}, {"tensor": 1})
    for layout, world, steps in zip(layouts, (2, 2, 1), (2, 4, 6), strict=True):
        # The schedule's last step stays 6: a stop in between is a kill after its checkpoint.
        part = {**moved, "parallel": layout}
        outcomes = pool.run(world, _stopped_after, tree=part, step=steps)
        assert outcomes == [Outcome()] * world
    expected, got = losses_of(tmp_path / "alone"), losses_of(tmp_path / "moved")
    assert list(got) == list(range(1, 7))
    assert got == pytest.approx(expected, rel=1e-5)
    assert held_out_of(tmp_path / "moved") == pytest.approx(held_out_of(tmp_path / "alone"), rel=1e-5)


class _Stopped(Exception):
    """A run that ends here leaves what a kill leaves: a checkpoint, and a status that says running."""


def _stopped_after(tree: Tree, step: int) -> Outcome:
    from lora_megatron.commands import saving

    original = saving.save_checkpoint

    def save(*arguments: Any, **named: Any) -> Any:
        under_way = original(*arguments, **named)
        if named["progress"].step == step < tree["train"]["steps"]:
            under_way.wait()
            raise _Stopped
        return under_way

    saving.save_checkpoint = save
    try:
        return attempt(tree)
    except _Stopped:
        return Outcome()
    finally:
        saving.save_checkpoint = original


def test_resume_never_silently_starts_or_continues(corpus: Path, tmp_path: Path) -> None:
    tree = make_tree(corpus, tmp_path / "run")
    auto = resumed(tree, tmp_path / "run", "auto")
    assert attempt(auto) == Outcome()  # a fresh folder: a fresh start
    first = losses_of(tmp_path / "run")
    assert list(first) == [1, 2, 3, 4, 5, 6]
    refused = attempt(tree)
    assert (refused.status, "set run.resume=auto" in refused.message) == (2, True)
    assert attempt(auto) == Outcome()  # finished already: nothing to do, and nothing lost
    assert losses_of(tmp_path / "run") == first
    assert attempt({**auto, "train": {**auto["train"], "steps": 8, "save_every": 0}}) == Outcome()
    assert list(losses_of(tmp_path / "run")) == [1, 2, 3, 4, 5, 6, 7, 8]
    fewer = attempt({**auto, "train": {**auto["train"], "steps": 3}})
    assert fewer.status == 2
    assert "train.steps = 3" in fewer.message
    assert "raise train.steps" in fewer.message


@pytest.mark.parametrize(
    ("section", "values", "name"),
    [
        ("method", {"targets": {"q": 4, "v": 3, "fc2": 1}}, "ranks"),
        ("method", {"alpha": 2.0}, "alpha"),
        ("method", {"name": "bitfit"}, "method"),
        ("base", {"seed": 5}, "base_fingerprint"),
        ("data", {"global_batch_size": 2}, "global_batch_size"),
        ("train", {"seed": 5}, "seed"),
        ("train", {"precision": "bf16"}, "precision"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    corpus: Path, finished: Path, tmp_path: Path, section: str, values: Tree, name: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "status.json"}
    outcome = attempt(resumed(make_tree(corpus, run, **{section: values}), run, "auto"))
    assert outcome.status == 4
    assert f"is another run's: {name} is" in outcome.message
    assert "choose another run.dir or give the configuration of that run" in outcome.message
    assert {path: path.read_bytes() for path in before} == before
    assert status_of(run)["error"] == outcome.message


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with the checkpoints of steps 4 and 6; copy it before changing it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert attempt(make_tree(corpus, run)) == Outcome()
    return run


def test_the_newest_checkpoints_are_kept(finished: Path, corpus: Path, tmp_path: Path) -> None:
    assert names_in(finished / "checkpoints") == ["step-00000004", "step-00000006"]
    train = {"steps": 5, "save_every": 1, "keep_checkpoints": 3}
    assert attempt(make_tree(corpus, tmp_path / "run", train=train)) == Outcome()
    assert names_in(tmp_path / "run" / "checkpoints") == ["step-00000003", "step-00000004", "step-00000005"]


@pytest.mark.parametrize("file", ["manifest.json", "adapter_model.safetensors", "state-00001-of-00001.safetensors"])
def test_a_damaged_newest_checkpoint_is_passed_over_aloud(
    finished: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = checkpoint_of(run, 6) / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    # The fewest to keep: the damaged one must not count, or a good one would be deleted for it.
    tree = resumed(make_tree(corpus, run, train={"keep_checkpoints": 1}), run, "auto")
    assert attempt(tree) == Outcome()
    said = capsys.readouterr().err
    assert f"checkpoint passed over: {path}" in said
    assert f"resumed from {checkpoint_of(run, 4)} at step 4" in said
    assert f"{checkpoint_of(run, 6)} is newer than step 4, where the run goes on: renamed to superseded-" in said
    assert losses_of(run) == losses_of(finished)
    assert adapter_bytes(run) == adapter_bytes(finished)
    assert read_manifest(checkpoint_of(run, 6))["step"] == 6
    kept = [name for name in names_in(run / "checkpoints") if name.startswith("step-")]
    assert kept == ["step-00000004", "step-00000006"]  # no step was taken from the newest yet


def test_when_every_checkpoint_is_damaged_nothing_starts_afresh(finished: Path, corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for step in (4, 6):
        (checkpoint_of(run, step) / "manifest.json").unlink()
    before = names_in(run)
    outcome = attempt(resumed(make_tree(corpus, run), run, "auto"))
    assert outcome.status == 4
    assert "every checkpoint in" in outcome.message
    assert "move them away to start afresh" in outcome.message
    assert names_in(run) == before
    status = status_of(run)  # a failed resume is what happened last
    assert (status["state"], status["exit_status"], status["error"]) == ("failed", 4, outcome.message)


def test_going_back_to_an_older_checkpoint_of_the_run(finished: Path, corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    tree = make_tree(corpus, run, optimizer={"lr": 1e-3})
    assert attempt(resumed(tree, run, checkpoint_of(run, 4))) == Outcome()
    assert [line["step"] for line in log_of(run)] == [1, 2, 3, 4, 5, 6]
    assert losses_of(run)[5] == losses_of(finished)[5]  # step 5 starts from the same parameters
    assert losses_of(run)[6] != losses_of(finished)[6]
    assert read_manifest(checkpoint_of(run, 6))["step"] == 6
    assert sum(name.startswith("superseded-step-00000006-") for name in names_in(run / "checkpoints")) == 1

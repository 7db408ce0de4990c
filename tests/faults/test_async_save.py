# SPDX-License-Identifier: Apache-2.0
"""Saving in the background changes nothing but the time that training waits.

The threads that write are held back by files, so that training is known to go on while a checkpoint is under way.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_megatron.checkpoint import state, tensors
from tests.commands.runs import Outcome, attempt, checkpoint_of, losses_of, names_in
from tests.faults.ranks import PATIENCE_S, train_ranks
from tests.faults.recovery import LAYOUTS, Undisturbed, named_checkpoints, result_of, tree_of


def hold_back(gate: Path, rank: str) -> None:
    """No tensor is written on this rank before `gate` is there."""
    if os.environ["RANK"] != rank:
        return
    write = state.save_tensors

    def save_tensors(*arguments: Any, **named: Any) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not gate.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return write(*arguments, **named)

    state.save_tensors = save_tensors


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("layout", "sections"),
    [
        ("TP2", {}),
        pytest.param("PP2", {"train": {"precision": "bf16"}}, marks=pytest.mark.slow),
        pytest.param("DP2", {}, marks=pytest.mark.slow),
        ("alone", {"method": {"name": "full", "targets": {}, "dropout": 0.0}}),
    ],
    ids=["TP2", "PP2-bf16", "DP2", "full"],
)
def test_what_is_written_late_is_what_was_true_at_the_step(
    corpus: Path, tmp_path: Path, layout: str, sections: dict[str, Any]
) -> None:
    """Every file of every checkpoint is the same, although training had changed every tensor before it was written."""
    world, folders = LAYOUTS[layout][0], {}
    for async_save in (False, True):
        run = tmp_path / f"async-{async_save}"
        train = {**sections.get("train", {}), "steps": 8, "save_every": 4, "keep_checkpoints": 8}
        tree = tree_of(layout, corpus, run, **{**sections, "train": {**train, "async_save": async_save}})
        gate = tmp_path / "gate"
        gate.unlink(missing_ok=True)
        before: Callable[[], None] | None = partial(hold_back, gate, "0") if async_save else None
        with train_ranks(tree, world=world, folder=tmp_path / f"logs-{async_save}", before=before) as ranks:
            if async_save:
                ranks.wait_until(lambda run=run: 8 in steps_logged(run))  # type: ignore[misc]
                assert not checkpoint_of(run, 4).exists()
                assert len([name for name in names_in(run / "checkpoints") if name.startswith(".tmp-")]) == 1
                gate.touch()
            assert set(ranks.statuses()) == {0}, ranks.logs()
        assert names_in(run / "checkpoints") == ["step-00000004", "step-00000008"]
        folders[async_save] = {step: content(checkpoint_of(run, step)) for step in (4, 8)}, losses_of(run)
    assert folders[True] == folders[False]


def steps_logged(run: Path) -> list[int]:
    return list(losses_of(run)) if (run / "metrics.jsonl").exists() else []


@pytest.mark.parametrize("slow_stage", ["0", "1"])
def test_a_checkpoint_appears_when_the_last_stage_is_whole_and_the_next_save_waits_for_it(
    corpus: Path, tmp_path: Path, undisturbed: Undisturbed, slow_stage: str
) -> None:
    run, gate = tmp_path / "run", tmp_path / "gate"
    expected = undisturbed("PP2")
    tree = tree_of("PP2", corpus, run, train={"steps": 8, "save_every": 4})
    with train_ranks(tree, world=2, folder=tmp_path, before=partial(hold_back, gate, slow_stage)) as ranks:
        ranks.wait_until(lambda: 8 in steps_logged(run))
        time.sleep(0.3)
        (temporary,) = (run / "checkpoints").glob("*")
        assert names_in(temporary)[1:] == [
            f"state-0000{2 - int(slow_stage)}-of-00002.safetensors"
        ]  # the part, the state
        assert ranks.alive == [0, 1]  # the save of step 8 waits, and with it the run
        gate.touch()
        assert ranks.statuses() == [0, 0], ranks.logs()
    assert named_checkpoints(run) == ["step-00000004", "step-00000008"]
    assert result_of(run) == expected


def test_a_bad_step_waits_for_the_checkpoint_under_way_and_names_the_right_one(corpus: Path, tmp_path: Path) -> None:
    run, gate = tmp_path / "run", tmp_path / "gate"
    train = {"steps": 6, "save_every": 3, "warmup_steps": 0}
    tree = tree_of("TP2", corpus, run, train=train)
    with train_ranks(tree, world=2, folder=tmp_path, before=partial(spoil_and_hold_back, gate)) as ranks:
        ranks.wait_until(lambda: 5 in steps_logged(run))
        assert not checkpoint_of(run, 3).exists()
        gate.touch()
        assert ranks.statuses() == [5, 5], ranks.logs()
        said = ranks.log()
    assert f"known to be good is that of step 3 (run.resume={checkpoint_of(run, 3)})" in said
    assert named_checkpoints(run) == ["step-00000003"]


def spoil_and_hold_back(gate: Path) -> None:
    """The loss of step 5 is NaN."""
    from lora_megatron.training import loop

    hold_back(gate, "0")
    run, steps = loop.run_microbatches, []

    def run_microbatches(*arguments: Any, **named: Any) -> Any:
        loss = run(*arguments, **named)
        steps.append(loss)
        return type(loss)(float("nan"), loss.tokens, (0,)) if len(steps) == 5 else loss

    loop.run_microbatches = run_microbatches


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("page_locked", [0, 2**30], ids=["pageable", "page-locked"])
def test_copies_of_a_gpu_are_of_the_step(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page_locked: int
) -> None:
    """Queued copies are waited for, and nothing that training does next reaches them."""
    monkeypatch.setattr(tensors, "_MOST_PAGE_LOCKED", page_locked)
    contents = []
    for async_save in (False, True):
        run = tmp_path / f"async-{async_save}"
        train = {"steps": 6, "save_every": 3, "precision": "bf16", "async_save": async_save}
        if async_save:
            hold_back_until_logged(run, 6, monkeypatch)
        assert attempt(tree_of("alone", corpus, run, train=train)) == Outcome()
        contents.append([content(checkpoint_of(run, step)) for step in (3, 6)])
    assert contents[0] == contents[1]


def hold_back_until_logged(run: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write = state.save_tensors

    def save_tensors(*arguments: Any, **named: Any) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while step not in steps_logged(run) and time.monotonic() < deadline:
            time.sleep(0.01)
        return write(*arguments, **named)

    monkeypatch.setattr(state, "save_tensors", save_tensors)

# SPDX-License-Identifier: Apache-2.0
"""The soak script: a few kills come to no loss, and it does notice what it looks for."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.commands.runs import checkpoint_of
from tests.faults.ranks import train_ranks
from tests.faults.recovery import tree_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "soak.py"


@pytest.mark.slow
def test_a_short_soak_loses_nothing(tmp_path: Path) -> None:
    result = tmp_path / "soak.json"
    command = [sys.executable, str(SCRIPT), "--kills", "5", "--json", str(result)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(result.read_text())
    assert facts["kills"] == 5 == sum(facts["victims"].values())
    assert set(facts["faults"].values()) == {0}
    assert "wrong results" in done.stdout


@pytest.fixture(scope="module")
def soak() -> SimpleNamespace:
    """The script as a module."""
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of steps 2, 4, 6 and 8; copy it before changing it."""
    run = tmp_path_factory.mktemp("trained") / "run"
    tree = tree_of("PP2", corpus, run, train={"keep_checkpoints": 9})
    with train_ranks(tree, world=2, folder=run.parent) as ranks:
        assert ranks.statuses() == [0, 0], ranks.logs()
    return run


def remove(run: Path, *steps: int) -> None:
    for step in steps:
        shutil.rmtree(checkpoint_of(run, step))


@pytest.mark.parametrize(
    ("spoil", "seen", "newest", "faults"),
    [
        (lambda run: None, 8, 8, {}),
        (lambda run: remove(run, 8), 6, 6, {}),
        (lambda run: remove(run, 8), 8, 6, {"lost checkpoints": 1}),
        (lambda run: remove(run, 8, 6, 4), -1, 2, {"too many steps lost": 1}),
        (lambda run: (checkpoint_of(run, 4) / "manifest.json").unlink(), 8, 8, {"damaged checkpoints": 1}),
        (lambda run: checkpoint_of(run, 8).rename(checkpoint_of(run, 9)), -1, 6, {"damaged checkpoints": 1}),
    ],
    ids=["nothing", "the last save was hit", "lost", "several lost", "damaged", "misnamed"],
)
def test_it_counts_what_must_not_be(
    soak: Any, trained: Path, tmp_path: Path, spoil: Any, seen: int, newest: int, faults: dict[str, int]
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    spoil(run)
    tested = soak.Soak(tmp_path, kills=1, seed=1)
    assert tested._check(run, seen) == newest
    assert {name: count for name, count in tested.tally.faults.items() if count} == faults
    assert tested.tally.steps_trained_again == 8 - newest

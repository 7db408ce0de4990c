# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at every named point of a save costs the steps since the last one and nothing else.

Whatever stands under a checkpoint's name afterwards is whole, and the run goes on to the bits of one that was never
killed.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.commands.runs import Tree, checkpoint_of, names_in
from tests.faults.ranks import train_ranks
from tests.faults.recovery import LAYOUTS, Undisturbed, check_recovery, named_checkpoints, result_of, tree_of
from tests.faults.save_points import POINTS, die, die_at


def kill_at(name: str, layout: str, tree: Tree, folder: Path, *, victim: int, both: bool = False) -> None:
    """Train until the victim dies at the point; who is left may not wait for ever."""
    with train_ranks(tree, world=LAYOUTS[layout][0], folder=folder, before=die_at(name, victim)) as ranks:
        assert ranks.wait(victim), f"not killed {name}\n{ranks.logs()}"
        if both:
            ranks.kill()
        statuses = ranks.statuses(seconds=60)
        assert statuses[victim] == -signal.SIGKILL, f"not killed {name}, but {statuses}\n{ranks.logs()}"
        assert 0 not in statuses


def check_kill(
    name: str, layout: str, corpus: Path, folder: Path, undisturbed: Undisturbed, *, victim: int = 0, both: bool = False
) -> None:
    expected = undisturbed(layout)
    run, point = folder / "run", POINTS[name]
    tree = tree_of(layout, corpus, run)
    kill_at(name, layout, tree, folder, victim=victim, both=both)
    found, last = named_checkpoints(run), checkpoint_of(run, point.step).name
    assert (last in found) == point.whole
    assert checkpoint_of(run, point.step - 2).name in found
    said = check_recovery(tree, layout, expected, folder=folder)
    assert f"resumed from {run / 'checkpoints' / found[-1]}" in said


@pytest.mark.parametrize("name", POINTS)
def test_a_kill_at_any_point(corpus: Path, tmp_path: Path, undisturbed: Undisturbed, name: str) -> None:
    check_kill(name, "alone", corpus, tmp_path, undisturbed)


ONE_OF_TWO = [
    ("PP2", "in the middle of a file", 1),
    ("PP2", "while the parts are joined", 0),
]
MORE_OF_TWO = [
    ("DP2", "before the manifest", 0),
    ("TP2", "after the copy", 1),
    ("TP2", "in the middle of a file", 0),
    ("PP2", "before a file", 1),
    ("PP2", "in the middle of a file", 0),
    ("PP2", "after a file", 1),
    ("PP2", "before the rename", 0),
    ("PP2", "while pruning", 0),
    ("DP2", "after the copy", 1),
]
"""A minute of starting processes, for the same code at other moments; of TP2 both ranks are killed in every run."""


@pytest.mark.parametrize(
    ("layout", "name", "victim"),
    [*ONE_OF_TWO, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_OF_TWO)],
)
def test_a_kill_of_one_of_two_ranks(
    corpus: Path, tmp_path: Path, undisturbed: Undisturbed, layout: str, name: str, victim: int
) -> None:
    check_kill(name, layout, corpus, tmp_path, undisturbed, victim=victim)


@pytest.mark.parametrize(
    ("layout", "name", "victim"), [("TP2", "before the rename", 0), ("PP2", "a file before its flush", 1)]
)
def test_a_kill_of_both_ranks(
    corpus: Path, tmp_path: Path, undisturbed: Undisturbed, layout: str, name: str, victim: int
) -> None:
    check_kill(name, layout, corpus, tmp_path, undisturbed, victim=victim, both=True)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_kill_before_the_first_status_leaves_the_folder_free(
    corpus: Path, tmp_path: Path, undisturbed: Undisturbed, resume: str
) -> None:
    expected, run = undisturbed("TP2"), tmp_path / "run"
    tree = tree_of("TP2", corpus, run, run={"dir": str(run), "resume": resume})
    with train_ranks(tree, world=2, folder=tmp_path, before=die_with_half_a_status) as ranks:
        assert -signal.SIGKILL in ranks.statuses(seconds=60)
    assert ".heartbeats" in names_in(run)
    assert [name for name in names_in(run) if name.startswith(".status.json.") and name.endswith(".tmp")]
    assert "status.json" not in names_in(run)
    with train_ranks(tree, world=2, folder=tmp_path) as ranks:
        assert ranks.statuses() == [0, 0], ranks.logs()
    assert result_of(run) == expected


def die_with_half_a_status() -> None:
    """Written under another name and not yet renamed."""
    replace = os.replace

    def deadly(source: str, target: Path) -> None:
        if Path(target).name == "status.json":
            die()
        replace(source, target)

    os.replace = deadly

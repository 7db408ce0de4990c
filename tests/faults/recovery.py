# SPDX-License-Identifier: Apache-2.0
"""What a run must come to after a fault: the losses and the adapter of one that nothing disturbed, to the bit."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

from lora_megatron.checkpoint.folder import read_manifest
from tests.commands.runs import Tree, checkpoint_of, evaluations_of, losses_of, make_tree, names_in, status_of
from tests.faults.ranks import train_ranks

LAYOUTS: dict[str, tuple[int, dict[str, Tree]]] = {
    "alone": (1, {}),
    "TP2": (2, {"parallel": {"tensor": 2}}),
    "PP2": (2, {"parallel": {"pipeline": 2}}),
    "DP2": (2, {"optimizer": {"lr": 5e-3, "sharding": "megatron"}}),
}


@dataclass(frozen=True)
class Result:
    """What training comes to."""

    losses: dict[int, float]
    evaluations: list[Tree]
    adapter: bytes


def result_of(run: Path) -> Result:
    """Of a finished run."""
    return Result(losses_of(run), evaluations_of(run), (run / "adapter" / "adapter_model.safetensors").read_bytes())


def tree_of(layout: str, corpus: Path, run: Path, /, **sections: Tree) -> Tree:
    """The configuration of a run of eight steps that saves at every second, in this layout."""
    given = {**LAYOUTS[layout][1]}
    for name, values in sections.items():
        given[name] = {**given.get(name, {}), **values}
    given["train"] = {"steps": 8, "warmup_steps": 1, **given.get("train", {})}
    return make_tree(corpus, run, **given)


class Undisturbed:
    """Results of runs without a fault, each trained once."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        self._corpus, self.folder = corpus, folder
        self._results: dict[str, Result] = {}

    def __call__(self, layout: str) -> Result:
        if layout not in self._results:
            run = self.folder / layout
            with train_ranks(tree_of(layout, self._corpus, run), world=LAYOUTS[layout][0], folder=run.parent) as ranks:
                assert set(ranks.statuses()) == {0}, ranks.logs()
            self._results[layout] = result_of(run)
            assert len(set(self._results[layout].losses.values())) == 8
        return self._results[layout]


def named_checkpoints(run: Path) -> list[str]:
    """Folders under a checkpoint's name, each of which must be whole."""
    names = [name for name in names_in(run / "checkpoints") if name.startswith("step-")]
    for name in names:
        assert read_manifest(run / "checkpoints" / name)["step"] == int(name[5:])
    return names


def resumed(tree: Tree, **train: object) -> Tree:
    """The same run, going on from its newest good checkpoint."""
    again = copy.deepcopy(tree)
    again["run"]["resume"] = "auto"
    again["train"].update(train)
    return again


def check_recovery(tree: Tree, layout: str, expected: Result, *, folder: Path) -> str:
    """Resume in the same layout to the very result, without a trace of the fault; answers what rank 0 said."""
    run = Path(tree["run"]["dir"])
    with train_ranks(resumed(tree), world=LAYOUTS[layout][0], folder=folder) as ranks:
        assert set(ranks.statuses()) == {0}, ranks.logs()
        said = ranks.log()
    assert result_of(run) == expected
    assert named_checkpoints(run) == [checkpoint_of(run, step).name for step in (6, 8)]
    assert not list(run.rglob(".tmp-*"))
    assert status_of(run)["state"] == "done"
    return said

# SPDX-License-Identifier: Apache-2.0
"""A prepared corpus, and a run whose steps are long enough to be interrupted between two of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.commands.runs import Tree, attempt_each, losses_of, make_corpus, make_tree
from tests.pool import Pool

STEPS = 12


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.parquet, validation.parquet and their manifest; read only."""
    return make_corpus(tmp_path_factory.mktemp("corpus") / "prepared")


def slow_tree(corpus: Path, folder: Path, *, tensor: int = 1, save_every: int = 0) -> Tree:
    """STEPS steps of 32 microbatches each, some tenths of a second on an idle machine."""
    return make_tree(
        corpus,
        folder,
        parallel={"tensor": tensor},
        data={"micro_batch_size": 1, "global_batch_size": 32, "validation": None},
        train={"steps": STEPS, "save_every": save_every},
    )


def write_tree(path: Path, tree: Tree) -> Path:
    """The configuration as the YAML file that a launcher takes."""
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def uninterrupted_losses(pool: Pool, tree: Tree, folder: Path) -> dict[int, float]:
    """Losses of the same run on two ranks of one machine, left alone."""
    tree = {**tree, "run": {"dir": str(folder / "uninterrupted")}}
    outcomes = pool.run(2, attempt_each, trees=[tree], store=str(folder / "store"))
    assert all(each[0].status == 0 for each in outcomes), outcomes
    return losses_of(folder / "uninterrupted")

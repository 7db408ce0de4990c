# SPDX-License-Identifier: Apache-2.0
"""The same corpus and threads as the tests of the commands, and what runs come to without a fault."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_megatron.parallel import groups
from tests.commands.conftest import corpus, one_thread
from tests.commands.runs import checkpoint_of, names_in
from tests.faults.finished_run import FILES, NEWEST
from tests.faults.recovery import Undisturbed

__all__ = ["corpus", "one_thread"]


@pytest.fixture(scope="session")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """What each layout's run comes to when nothing happens to it."""
    return Undisturbed(corpus, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="session")
def finished(undisturbed: Undisturbed) -> Path:
    """A run of two pipeline stages with the checkpoints of steps 6 and 8; copy it before changing it."""
    undisturbed("PP2")
    run = undisturbed.folder / "PP2"
    assert names_in(checkpoint_of(run, NEWEST)) == sorted(FILES)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def alone() -> Iterator[None]:
    """A world of one process."""
    groups.join_world()
    yield
    groups.stop()

# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpus import GPUS
from tests.pool import Pool

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four gloo processes on this machine's CPU."""
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def nccl() -> Iterator[Pool]:
    """One process per GPU, two at most."""
    pool = Pool(min(GPUS, 2), backend="nccl")
    yield pool
    pool.close()


LONGEST = (
    "test_quickstart.py",
    "launch/test_slurm.py",
    "test_readme.py",
    "launch/test_one_host_run.py",
    "launch/test_two_agents.py",
    "test_oracle.py",
)
"""Files that take longest, most of them one test that starts many processes: at the end of a run the others' workers
would wait for them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, everything else in its order."""
    here = Path(__file__).parent
    items.sort(key=lambda item: str(item.path.relative_to(here)) not in LONGEST)

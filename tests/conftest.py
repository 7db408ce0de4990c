# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pool import Pool

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four gloo processes on this machine's CPU."""
    pool = Pool(4)
    yield pool
    pool.close()

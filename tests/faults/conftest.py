# SPDX-License-Identifier: Apache-2.0
"""The same corpus and threads as the tests of the commands, and what runs come to without a fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands.conftest import corpus, one_thread
from tests.faults.recovery import Undisturbed

__all__ = ["corpus", "one_thread"]


@pytest.fixture(scope="session")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """What each layout's run comes to when nothing happens to it."""
    return Undisturbed(corpus, tmp_path_factory.mktemp("undisturbed"))

# SPDX-License-Identifier: Apache-2.0
"""A prepared corpus for the tests of this folder, and one thread per process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.commands.runs import make_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.parquet, validation.parquet and their manifest; read only."""
    return make_corpus(tmp_path_factory.mktemp("corpus") / "prepared")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Runs in this process compute as those in the pool do, and leave the cores to the pool."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

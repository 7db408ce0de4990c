# SPDX-License-Identifier: Apache-2.0
"""One saved model of each name for all tests that do not change it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.huggingface.models import save_model


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """saved("gpt2"): the folder of that tiny model, in several files where it is a Llama."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            save_model(name, root / name, max_shard_size="20KB" if name.startswith("llama") else "5GB")
        return root / name

    return folder

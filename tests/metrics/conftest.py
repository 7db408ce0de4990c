# SPDX-License-Identifier: Apache-2.0
"""Java takes seconds to start METEOR: only tests that ask for it find it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

_PATH = os.environ.get("PATH", "")


@pytest.fixture(autouse=True)
def without_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def real_java(without_java: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips where there is no Java."""
    if shutil.which("java", path=_PATH) is None:
        pytest.skip("there is no Java")
    monkeypatch.setenv("PATH", _PATH)

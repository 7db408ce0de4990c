# SPDX-License-Identifier: Apache-2.0
"""environment.json: what is in it, and what is not."""

from __future__ import annotations

import json
import socket
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import torch

from lora_megatron.measure import environment
from lora_megatron.measure.environment import describe_environment


def test_versions_and_devices_are_named() -> None:
    described = describe_environment()
    assert described["packages"]["torch"] == metadata.version("torch")
    assert described["packages"]["megatron-core"] == metadata.version("megatron-core")
    assert described["packages"]["deepspeed"] in (None, environment._version("deepspeed"))
    assert described["python"].startswith("3.")
    if torch.cuda.is_available():
        assert described["devices"]["gpus"][0]["memory_bytes"] > 2**30
    else:
        assert described["devices"]["type"] == "cpu"
        assert described["devices"]["cores"] >= 1
        assert described["devices"]["memory_bytes"] > 2**20
    assert json.loads(json.dumps(described, allow_nan=False)) == described


def test_no_secret_and_no_name_of_the_machine_gets_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret_value_1234")
    text = json.dumps(describe_environment())
    assert "hf_secret_value_1234" not in text
    assert str(Path.home()) not in text
    if len(socket.gethostname()) > 5:
        assert socket.gethostname() not in text


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.invalid")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pretends to hold the package."""
    module = tmp_path / "lora_megatron" / "measure" / "environment.py"
    module.parent.mkdir(parents=True)
    module.write_text("# stand-in\n")
    monkeypatch.setattr(environment, "__file__", str(module))
    return tmp_path


def test_commit_and_changes_of_the_checkout(installed: Path) -> None:
    assert environment._git_state(installed) is None
    git(installed, "init")
    assert environment._git_state(installed) is None  # an untracked copy inside somebody's repository
    git(installed, "add", ".")
    git(installed, "commit", "-m", "first")
    state = environment._git_state(installed)
    assert state is not None
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    (installed / "lora_megatron" / "measure" / "environment.py").write_text("# changed\n")
    assert environment._git_state(installed) == {"commit": state["commit"], "dirty": True}


def test_no_git_is_no_error(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(installed))
    assert environment._git_state(installed) is None
    assert describe_environment()["git"] is None

# SPDX-License-Identifier: Apache-2.0
"""A finished run of two pipeline stages to be damaged, and what `run.resume=auto` finds in it."""

from __future__ import annotations

from pathlib import Path

from lora_megatron.checkpoint.folder import read_manifest
from lora_megatron.checkpoint.state import newest_good
from tests.commands.runs import checkpoint_of

FILES = [
    "manifest.json",
    "state-00001-of-00002.safetensors",
    "state-00002-of-00002.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
]
NEWEST, BEFORE = 8, 6


def find(run: Path) -> tuple[int, str]:
    """The step that `run.resume=auto` finds, and what it says meanwhile."""
    said: list[str] = []
    identity = read_manifest(checkpoint_of(run, BEFORE))["identity"]
    found = newest_good(run, identity, said.append)
    assert found is not None
    assert found[0] == checkpoint_of(run, found[1].step)
    return found[1].step, "\n".join(said)

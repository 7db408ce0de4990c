# SPDX-License-Identifier: Apache-2.0
"""Whoever edits a checkpoint and makes its manifest fit again meets the checks of content, and runs no code."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_megatron.checkpoint.folder import read_manifest
from lora_megatron.checkpoint.state import Progress, read_progress
from lora_megatron.errors import CheckpointError
from lora_megatron.strict_json import load_json_object
from tests.checkpoint.seal import reseal
from tests.commands.runs import Tree, checkpoint_of
from tests.faults.finished_run import BEFORE, FILES, NEWEST, find


@pytest.mark.usefixtures("alone")
def test_values_that_are_not_finite_are_passed_over_although_the_hashes_fit(run: Path) -> None:
    path = checkpoint_of(run, NEWEST) / FILES[2]
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[-1] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    reseal(checkpoint_of(run, NEWEST))
    step, said = find(run)
    assert (step, f"{path}: {name} holds values that are not finite" in said) == (BEFORE, True)


class Payload:
    """What a pickle would do to whoever loads it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("name", FILES[1:])
@pytest.mark.usefixtures("alone")
def test_a_pickle_in_a_checkpoint_never_runs(run: Path, tmp_path: Path, name: str) -> None:
    """Even where the manifest has been made to fit."""
    trace, path = tmp_path / "trace", checkpoint_of(run, NEWEST) / name
    path.write_bytes(pickle.dumps(Payload(trace)))
    reseal(checkpoint_of(run, NEWEST))
    if name.endswith(".safetensors"):
        step, said = find(run)
        assert (step, f"{path} is not a readable safetensors file" in said) == (BEFORE, True)
    else:
        assert find(run) == (NEWEST, "")  # resuming does not read it
        with pytest.raises(CheckpointError, match=str(path)):
            load_json_object(path, "an adapter's configuration", CheckpointError)
    assert not trace.exists()
    pickle.loads((checkpoint_of(run, NEWEST) / name).read_bytes())
    assert trace.exists()  # it would have


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": 6}, "holds step 6"),
        ({"step": "8"}, "holds step '8'"),
        ({"step": 8.0}, "is not a training checkpoint"),
        ({"consumed_samples": -4}, "is not a training checkpoint"),
        ({"consumed_samples": True}, "is not a training checkpoint"),
        ({"kind": "adapter"}, "is not a training checkpoint"),
        ({"identity": None}, "is not a training checkpoint"),
        ({"identity": {}}, "is another run's"),
    ],
)
@pytest.mark.usefixtures("alone")
def test_a_manifest_edited_and_sealed_again_is_refused(run: Path, change: Tree, words: str) -> None:
    folder = checkpoint_of(run, NEWEST)
    identity = read_manifest(folder)["identity"]
    assert read_progress(folder, identity) == Progress(NEWEST, 4 * NEWEST)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **change}))
    reseal(folder)
    with pytest.raises(CheckpointError) as caught:
        read_progress(folder, identity)
    assert words in str(caught.value)

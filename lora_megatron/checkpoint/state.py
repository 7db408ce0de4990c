# SPDX-License-Identifier: Apache-2.0
"""Training checkpoints: everything a run needs to go on as if it had never stopped.

`checkpoints/step-00000100/` holds the optimizer's fp32 masters and moments as whole tensors under global names (one
file per pipeline stage), the adapter in its deployable form, and in the manifest the step, the count of consumed
samples and what the run is. The data order and every dropout mask are functions of (seed, sample), so that count is
the state of the random numbers too, under any layout.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor, nn

from lora_megatron.checkpoint.adapter import TENSORS, adapter_part_name, adapter_tensors, join_adapter_parts
from lora_megatron.checkpoint.background import BackgroundFolder, Receipts
from lora_megatron.checkpoint.folder import MANIFEST, publish_folder, read_manifest, remove_folder, verify_file
from lora_megatron.checkpoint.tensors import (
    Read,
    TensorFiles,
    fingerprint,
    gather_stage,
    require_finite,
    save_tensors,
)
from lora_megatron.errors import CheckpointError
from lora_megatron.layers.sharding import Shard, shard_of
from lora_megatron.methods.method import Method
from lora_megatron.model.names import Named, named_parameters
from lora_megatron.model.shape import ModelShape
from lora_megatron.parallel.agree import gather_text, require_equal, together

_NAME = re.compile(r"^step-(\d{8})$")


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    step: int
    consumed_samples: int


def checkpoint_path(run: Path, step: int) -> Path:
    """checkpoints/step-00000100 of a run folder."""
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """Folders that bear a checkpoint's name, newest first; temporaries are not among them."""
    folder = run / "checkpoints"
    found = [p for p in folder.iterdir() if _NAME.match(p.name)] if folder.is_dir() else []
    return sorted(found, reverse=True)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.removeprefix("step-"))


def known_good(run: Path, step: int) -> Path | None:
    """The newest checkpoint from which a finite step was taken, of a run that stands at `step`: one of an earlier step.

    That of `step` itself may hold parameters that are finite and yet give NaN at once.
    """
    return next((folder for folder in checkpoints(run) if step_of(folder) < step), None)


def save_checkpoint(
    run: Path,
    chunks: Sequence[nn.Module],
    state: Callable[[], Iterator[tuple[str, Tensor]]],
    parameters: dict[nn.Parameter, str],
    *,
    progress: Progress,
    identity: dict[str, Any],
    method: Method,
    shape: ModelShape,
    adapter_facts: dict[str, Any],
    keep: int,
) -> BackgroundFolder:
    """Copy everything that a checkpoint holds, and begin to write it; collective.

    When this returns, training may go on. The checkpoint exists once the answer's `advance` or `wait` has said so; then
    all but the newest `keep` are deleted, never one of the newest two: no step was taken from the last one yet.

    The copy takes as much memory of the CPU, on the one rank of each pipeline stage that writes, as the stage's file.
    `state` iterates over the optimizer's (`<name>.<kind>`, this tensor rank's part). `identity` is what a run must
    share to be resumed from here. The second copy of a tied embedding is left to the stage with the first.

    Raises:
        CheckpointError: on all ranks; the earlier checkpoints are untouched.
        NumericalError: the same, for a tensor that is not finite.
    """
    stage, stages = mpu.get_pipeline_model_parallel_rank(), mpu.get_pipeline_model_parallel_world_size()
    copies = {n.name for n in named_parameters(chunks) if n.is_copy}
    shards = {name: shard_of(parameter) for parameter, name in parameters.items()}
    facts = {"kind": "checkpoint", **asdict(progress), "identity": identity, "adapter": adapter_facts}

    def parts() -> Iterator[tuple[str, Tensor, Shard]]:
        for key, tensor in state():
            name = key.rpartition(".")[0]
            if name not in copies:
                yield key, tensor, shards[name]

    optimizer = together(lambda: gather_stage(parts()))
    adapter = {} if method.trains_base else together(lambda: gather_stage(adapter_tensors(chunks, shape)))

    def write(temporary: Path) -> Receipts:
        files = {f"state-{stage + 1:05d}-of-{stages:05d}.safetensors": optimizer, part: adapter}
        return {name: save_tensors(temporary / name, whole, {"format": "pt"}) for name, whole in files.items() if whole}

    def publish(temporary: Path, receipts: Receipts) -> None:
        if not method.trains_base:
            joined = join_adapter_parts(temporary, method, shape, adapter_facts)
            receipts = {name: receipt for name, receipt in receipts.items() if not name.startswith("part-")}
            receipts[TENSORS] = joined
        publish_folder(temporary, final, facts, receipts=receipts)
        for old in checkpoints(run)[max(keep, 2) :]:
            remove_folder(old)

    final, part = checkpoint_path(run, progress.step), adapter_part_name()
    return BackgroundFolder(final, write, publish, one_writer=stages == 1)


def read_progress(folder: Path, identity: dict[str, Any]) -> Progress:
    """Check a checkpoint and say where it stands; collective. Every file is read once on each machine.

    Raises:
        CheckpointError: on all ranks: damaged, holding values that are not finite, not a checkpoint, one of another
            step than its name says, or another run's: the message names the first difference.
    """
    return _progress(_whole_manifest(folder), folder, identity)


def _whole_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, when hashes, values and the step in the name are right; the same one on all ranks; collective."""
    hosts, rank = gather_text(socket.gethostname()), dist.get_rank()
    neighbours = [other for other, host in enumerate(hosts) if host == hosts[rank]]

    def verify() -> dict[str, Any]:
        manifest = read_manifest(folder, verify=False)
        by_size = sorted(manifest["files"], key=lambda name: (-manifest["files"][name]["bytes"], name))
        for name in by_size[neighbours.index(rank) :: len(neighbours)]:
            verify_file(folder, manifest, name)
            if name.endswith(".safetensors"):
                require_finite(folder / name)
        if _NAME.match(folder.name) and manifest.get("step") != step_of(folder):
            raise CheckpointError(
                f"{folder} holds step {manifest.get('step')!r}: it is another checkpoint under this name; move it away"
            )
        return manifest

    manifest = together(verify)
    require_equal(f"{folder / MANIFEST}", fingerprint([json.dumps(manifest, sort_keys=True)]))
    return manifest


def _progress(manifest: dict[str, Any], folder: Path, identity: dict[str, Any]) -> Progress:
    stored = manifest.get("identity")
    step, consumed = manifest.get("step"), manifest.get("consumed_samples")
    numbers = type(step) is int and type(consumed) is int and step >= 0 and consumed >= 0
    if manifest.get("kind") != "checkpoint" or not isinstance(stored, dict) or not numbers:
        raise CheckpointError(f"{folder} is not a training checkpoint")
    assert isinstance(step, int)
    assert isinstance(consumed, int)
    # The method first: with another one its ranks, alpha and more differ too.
    for name in sorted(set(stored) | set(identity), key=lambda name: (name != "method", name)):
        if stored.get(name) != identity.get(name):
            there, here = reprlib.repr(stored.get(name)), reprlib.repr(identity.get(name))
            raise CheckpointError(
                f"{folder} is another run's: {name} is {there} there and {here} here: choose another run.dir or give "
                "the configuration of that run"
            )
    return Progress(step, consumed)


def load_checkpoint(
    folder: Path, named: Sequence[Named], load: Callable[[dict[nn.Parameter, str], Read], None]
) -> None:
    """Hand the optimizer a reader of this tensor rank's parts; `read_progress` has checked the folder.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    size = mpu.get_tensor_model_parallel_world_size()
    parameters = {n.parameter: n.name for n in named if n.parameter.requires_grad}
    by_name = {name: parameter for parameter, name in parameters.items()}
    with TensorFiles(sorted(folder.glob("state-*.safetensors"))) as tensors:

        def read(key: str) -> Tensor:
            parameter = by_name[key.rpartition(".")[0]]
            shard = shard_of(parameter)
            return tensors.part(key, shard, shape=shard.full_shape(parameter.shape, size), dtype=torch.float32)

        load(parameters, read)


def newest_good(
    run: Path, identity: dict[str, Any], say: Callable[[str], None], *, before: float = math.inf
) -> tuple[Path, Progress] | None:
    """The newest checkpoint that is whole, of a step before `before`; None when there is none at all; collective.

    One that is damaged, or that any rank cannot read, is named aloud and passed over.

    Raises:
        CheckpointError: there are checkpoints and all are damaged, or the newest good one is another run's.
    """
    found = json.dumps([folder.name for folder in checkpoints(run)])  # a network file system may show others other ones
    names: list[str] = json.loads(gather_text(found)[0])
    folders = [run / "checkpoints" / name for name in names if step_of(Path(name)) < before]
    for folder in folders:
        try:
            manifest = _whole_manifest(folder)
        except CheckpointError as error:
            say(f"checkpoint passed over: {error}")
            continue
        return folder, _progress(manifest, folder, identity)
    if folders:
        raise CheckpointError(f"every checkpoint in {run / 'checkpoints'} is damaged; move them away to start afresh")
    return None


def set_aside_newer(run: Path, step: int, say: Callable[[str], None]) -> None:
    """Rename what was saved after `step`, where a run goes on: it is damaged, or of a course no longer followed.

    Left under its name it would stop the save of that step, and count among the checkpoints to keep.
    """
    for folder in checkpoints(run):
        if step_of(folder) > step:
            aside = folder.with_name(f"superseded-{folder.name}-{uuid.uuid4().hex[:8]}")
            folder.rename(aside)
            say(f"{folder} is newer than step {step}, where the run goes on: renamed to {aside.name}")

# SPDX-License-Identifier: Apache-2.0
"""The named points of a save, and how a forked rank dies at one of them.

Nothing in the program knows of them: the rank replaces a function of the program by one that dies before it, after it
or half-way, and only once the save to hit has begun.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lora_megatron.checkpoint import adapter, background, folder, state
from lora_megatron.commands import saving
from lora_megatron.strict_safetensors import SafetensorsWriter

HIT = 4
"""The step whose save is hit where the point says no other: that of step 2 is whole."""
LATE = 6
"""The first step whose save deletes a checkpoint, that of step 2."""

Function = Callable[..., Any]


@dataclass(frozen=True)
class Point:
    """Where the function of this name is called."""

    owner: Any
    name: str
    how: Callable[[Function], Function]
    whole: bool = False
    """Whether the checkpoint stands under its name by then."""
    step: int = HIT
    every_writer: bool = False
    """Whether each stage's writer comes here, and not rank 0 alone."""


def die() -> None:
    """No handler, no cleaning up, no flush."""
    os.kill(os.getpid(), signal.SIGKILL)


def before(original: Function) -> Function:
    return lambda *arguments, **named: die()


def after(original: Function) -> Function:
    def deadly(*arguments: Any, **named: Any) -> None:
        original(*arguments, **named)
        die()

    return deadly


def in_the_middle_of_a_file(original: Function) -> Function:
    """Before the fourth tensor, when a part of the third is written."""
    written: list[str] = []

    def write(self: SafetensorsWriter, name: str, tensor: Any) -> None:
        written.append(name)
        if len(written) == 4:
            die()
        original(self, name, tensor)

    return write


def half_a_manifest(original: Function) -> Function:
    def write_json(path: Path, value: Any) -> None:
        original(path, value)
        os.truncate(path, path.stat().st_size // 2)
        die()

    return write_json


def half_deleted(original: Function) -> Function:
    def rmtree(path: Path, **named: Any) -> None:
        sorted(Path(path).iterdir())[0].unlink()
        die()

    return rmtree


POINTS = {
    "before the copy": Point(state, "gather_stage", before, every_writer=True),
    "after the copy": Point(state, "gather_stage", after, every_writer=True),
    "before any write": Point(background, "prepare_folder", before),
    "an empty temporary": Point(background, "prepare_folder", after),
    "before a file": Point(state, "save_tensors", before, every_writer=True),
    "in the middle of a file": Point(SafetensorsWriter, "write", in_the_middle_of_a_file, every_writer=True),
    "a file before its flush": Point(SafetensorsWriter, "close", before, every_writer=True),
    "after a file": Point(state, "save_tensors", after, every_writer=True),
    "before the parts are joined": Point(state, "join_adapter_parts", before),
    "while the parts are joined": Point(adapter, "write_json", before),
    "before the manifest": Point(folder, "write_manifest", before),
    "in the middle of the manifest": Point(folder, "write_json", half_a_manifest),
    "after the manifest": Point(folder, "write_manifest", after),
    "before the rename": Point(folder.os, "rename", before),
    "after the rename": Point(folder.os, "rename", after, whole=True),
    "before pruning": Point(state, "remove_folder", before, whole=True, step=LATE),
    "while pruning": Point(folder.shutil, "rmtree", half_deleted, whole=True, step=LATE),
    "after pruning": Point(state, "remove_folder", after, whole=True, step=LATE),
}


def die_at(name: str, victim: int) -> Callable[[], None]:
    """What makes rank `victim` die at this point, to be given to `ranks.start` as `before`."""
    return partial(_arm, name, victim)


def _arm(name: str, victim: int) -> None:
    point, save = POINTS[name], saving.save_checkpoint

    def save_checkpoint(*arguments: Any, **named: Any) -> Any:
        if named["progress"].step == point.step and os.environ["RANK"] == str(victim):
            setattr(point.owner, point.name, point.how(getattr(point.owner, point.name)))
        return save(*arguments, **named)

    saving.save_checkpoint = save_checkpoint

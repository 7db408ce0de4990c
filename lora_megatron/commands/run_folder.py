# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: what is in it, who may write into it, and where a run resumes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_megatron.checkpoint.state import Progress, newest_good, read_progress, set_aside_newer
from lora_megatron.config import Config
from lora_megatron.errors import CheckpointError, ConfigError
from lora_megatron.measure.atomic import write_json, write_text
from lora_megatron.measure.environment import describe_environment


def claim(config: Config) -> None:
    """Refuse a folder that holds a run already, unless the run shall resume.

    Raises:
        ConfigError: the folder is not empty and the run starts afresh or from a checkpoint outside of it, or it is
            not a folder.
    """
    folder, resume = Path(config.run.dir), config.run.resume
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run.dir = {folder} is a file; choose a folder")
    if resume == "auto" or not folder.is_dir() or not any(folder.iterdir()):
        return
    if resume == "never":
        raise ConfigError(
            f"run.dir = {folder} holds a run already: choose another run.dir, or set run.resume=auto to continue it"
        )
    if Path(resume).resolve().parent.parent != folder.resolve():
        raise ConfigError(
            f"run.dir = {folder} holds a run already, and run.resume = {resume} is not of that run: choose another "
            "run.dir"
        )


def find_checkpoint(
    config: Config, identity: dict[str, Any], say: Callable[[str], None]
) -> tuple[Path, Progress] | None:
    """The checkpoint to resume from, None for a fresh start; damaged ones are passed over aloud.

    Raises:
        CheckpointError: the named checkpoint is damaged or another run's.
    """
    if config.run.resume == "never":
        return None
    if config.run.resume == "auto":
        return newest_good(Path(config.run.dir), identity, say)
    folder = Path(config.run.resume)
    if not folder.is_dir():
        raise CheckpointError(f"run.resume = {folder} is neither never, nor auto, nor the folder of a checkpoint")
    return folder, read_progress(folder, identity)


def begin(config: Config, step: int, say: Callable[[str], None]) -> None:
    """Make the folder and write the resolved configuration, the environment and the status `running`.

    A run that goes on from `step` sets newer checkpoints aside.
    """
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    if step:
        set_aside_newer(folder, step, say)
    write_text(folder / "config.yaml", config.to_yaml())
    write_json(folder / "environment.json", describe_environment())
    set_status(config, "running", step=step)


def set_status(config: Config, state: str, **facts: Any) -> None:
    """status.json: running, done, failed or preempted."""
    status = {"state": state, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts}
    write_json(Path(config.run.dir) / "status.json", status)


@contextlib.contextmanager
def failure_recorded(config: Config, *, enabled: bool) -> Iterator[None]:
    """status.json says `failed`, why and with which exit status, when an exception passes through."""
    try:
        yield
    except Exception as error:  # whatever it is, it is recorded and goes on
        if enabled:
            with contextlib.suppress(OSError):  # the reason may be a full disk
                set_status(config, "failed", exit_status=getattr(error, "exit_status", 1), error=str(error))
        raise

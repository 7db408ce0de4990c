# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: what is in it, who may write into it, and where a run resumes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_megatron.checkpoint.state import Progress, newest_good, read_progress
from lora_megatron.config import Config
from lora_megatron.errors import ConfigError
from lora_megatron.measure.atomic import write_json, write_text
from lora_megatron.measure.environment import describe_environment

RESUME_CHOICES = ("never", "auto")


def claim(config: Config) -> None:
    """Refuse a folder that holds a run already, unless the run shall resume.

    Raises:
        ConfigError: `run.resume = never` and the folder is not empty, or it is not a folder.
    """
    folder = Path(config.run.dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run.dir = {folder} is a file; choose a folder")
    if config.run.resume == "never" and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"run.dir = {folder} holds a run already: choose another run.dir, or set run.resume=auto to continue it"
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
    return folder, read_progress(folder, identity)


def describe(config: Config) -> None:
    """Write the resolved configuration and the environment."""
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", config.to_yaml())
    write_json(folder / "environment.json", describe_environment())


def set_status(config: Config, state: str, **facts: Any) -> None:
    """status.json: running, done, failed or preempted."""
    folder = Path(config.run.dir)
    if folder.is_dir():
        write_json(folder / "status.json", {"state": state, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts})

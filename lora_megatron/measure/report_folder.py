# SPDX-License-Identifier: Apache-2.0
"""Whose a folder is that a report is to be written into: nobody's, or an earlier report's of the same kind."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from lora_megatron.errors import ConfigError

JSON_NAME, MARKDOWN_NAME = "report.json", "report.md"


def require_no_file(folder: Path) -> None:
    """Raise ConfigError where --out is a file."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file: choose a folder")


def claim_folder(folder: Path, *, kind: str, files: Collection[str] = (JSON_NAME, MARKDOWN_NAME)) -> None:
    """Make the folder of a report; one that is there must hold nothing but `files` of an earlier one of this kind.

    Raises:
        ConfigError: it is a file, or holds something else.
        OSError: it cannot be read or made.
    """
    require_no_file(folder)
    folder.mkdir(parents=True, exist_ok=True)
    strange = sorted(path.name for path in folder.iterdir() if path.name not in files)
    if not strange and (folder / JSON_NAME).exists() and _kind_of(folder / JSON_NAME) != kind:
        strange = [JSON_NAME]
    if strange:
        raise ConfigError(f"--out {folder} holds {strange[0]}, which no {kind} has written: choose another folder")


def _kind_of(report: Path) -> str | None:
    """What a report.json says it is; None for a file of somebody else."""
    try:
        value = json.loads(report.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    return str(value.get("kind")) if isinstance(value, dict) else None

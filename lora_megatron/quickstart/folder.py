# SPDX-License-Identifier: Apache-2.0
"""The quickstart's folder: whose it is, and making room for a new one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from lora_megatron.errors import ConfigError
from lora_megatron.measure.atomic import write_json
from lora_megatron.measure.report_folder import require_no_file

MARKER = "quickstart.json"
"""Written first and removed never, so that also a killed quickstart is known as one."""
_CONTENTS = ("data", "configs", "base", "lora", "full", "logs", "report.json", "report.md", "report.html", "loss.png")


def claim(out: Path, *, seed: int, say: Callable[[str], None]) -> None:
    """Leave `out` with empty `configs` and `logs`; what an earlier quickstart wrote is removed, aloud.

    Raises:
        ConfigError: `out` is a file, cannot be written, or holds anything that no quickstart wrote.
    """
    require_no_file(out)
    try:
        present = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
        foreign = [name for name in present if name != MARKER and name not in _CONTENTS]
        if present and MARKER not in present:
            foreign = present
        if foreign:
            raise ConfigError(f"--out {out} holds {foreign[0]}, which no quickstart wrote: choose another --out")
        if present:
            say(f"replacing the earlier quickstart in {out}")
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / MARKER, {"state": "running", "seed": seed})
        for name in present:
            if name != MARKER:
                _remove(out / name)
        for name in ("configs", "logs"):
            (out / name).mkdir()
    except OSError as error:
        raise ConfigError(f"cannot write into --out {out}: {error.strerror}; choose another --out") from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()

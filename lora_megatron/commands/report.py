# SPDX-License-Identifier: Apache-2.0
"""`lora-megatron report`: report.html of a run that is going on, or that ended before it wrote one."""

from __future__ import annotations

from pathlib import Path

from lora_megatron.checkpoint.folder import disk_errors
from lora_megatron.errors import ConfigError
from lora_megatron.measure.html_report import write_html_report


def run_report(folder: Path) -> None:
    """Write report.html into the run folder `folder`, from what is there, and say where it is.

    Raises:
        ConfigError: `folder` is not that of a run.
        CheckpointError: a file in it cannot be read, or report.html not written.
    """
    if not (folder / "config.yaml").is_file() or not (folder / "environment.json").is_file():
        raise ConfigError(f"{folder} is not the folder of a run (config.yaml, environment.json): give a run.dir")
    with disk_errors(folder):
        print(write_html_report(folder))

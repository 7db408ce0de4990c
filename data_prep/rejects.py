# SPDX-License-Identifier: Apache-2.0
"""The budget of bad records: none by default, so nothing is lost in silence."""

from __future__ import annotations

import sys
from pathlib import Path

from lora_megatron.errors import ConfigError, DataError


class RejectBudget:
    """Counts rejected records of one run and stops it when there are more than `allowed`."""

    def __init__(self, allowed: int = 0) -> None:
        if allowed < 0:
            raise ConfigError(f"--max-rejected {allowed} must be 0 or more")
        self.allowed = allowed
        self.count = 0
        self._passed_over = 0

    def pass_over(self, count: int) -> None:
        """Say and count nothing about the next `count` rejected records: they were met before."""
        self._passed_over = count

    def reject(self, path: Path, line: int, reason: str) -> None:
        """Count one bad record and name it on stderr. Raises DataError once the budget is spent."""
        if self._passed_over:
            self._passed_over -= 1
            return
        self.count += 1
        if self.count > self.allowed:
            raise DataError(
                f"{path}:{line}: {reason} (rejected record {self.count}, allowed {self.allowed}; "
                f"mend the line or raise --max-rejected)"
            )
        print(f"rejected {path}:{line}: {reason}", file=sys.stderr)

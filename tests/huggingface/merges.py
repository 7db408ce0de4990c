# SPDX-License-Identifier: Apache-2.0
"""The command `merge` run in this process, and whether it left anything behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_megatron.__main__ import main


class Merge:
    """Runs the command in this process; whatever it does, base and adapter stay as they are."""

    def __init__(self, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.made, self.folder, self.capsys = made, tmp_path, capsys
        self.out = tmp_path / "new" / "out"

    def __call__(
        self, *flags: str, base: Path | None = None, adapter: Path | None = None, out: Path | None = None
    ) -> tuple[int, str, str]:
        self.capsys.readouterr()
        names = {"--base": base or self.made / "base", "--adapter": adapter or self.made / "adapter"}
        pairs = [str(part) for pair in {**names, "--out": out or self.out}.items() for part in pair]
        return main(["merge", *pairs, *flags]), *self.capsys.readouterr()

    def refused(self, status: int, *words: str, **folders: Path) -> None:
        """The status, each of `words` in the one line, and nothing new anywhere."""
        before = everything(self.folder)
        ended, out, err = self(**folders)
        assert (ended, out) == (status, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        for word in words:
            assert word in err
        assert everything(self.folder) == before


def everything(folder: Path) -> dict[str, int]:
    """Every path below a folder, hidden ones too, with what tells whether it was written to."""
    return {str(path): path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")] if path != folder}

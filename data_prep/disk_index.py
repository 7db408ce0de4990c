# SPDX-License-Identifier: Apache-2.0
"""Keys and their values on the disk, so that looking something up costs the same memory whatever the corpus' size."""

from __future__ import annotations

import sqlite3
from types import TracebackType
from typing import Self

from lora_megatron.errors import DataError

_CACHE_KIB = 8192
MOST_PAGES = 2**32 - 2
"""Of 4 KiB, SQLite's own limit: the disk is full long before."""


class DiskIndex:
    """Texts by key in a nameless temporary file, which goes with this object. A context manager."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)  # "": SQLite makes a temporary file and deletes it
        for statement in (
            f"PRAGMA cache_size = -{_CACHE_KIB}",
            "PRAGMA journal_mode = OFF",
            f"PRAGMA max_page_count = {MOST_PAGES}",
            "CREATE TABLE entries (key TEXT, value TEXT)",
            "CREATE INDEX by_key ON entries (key)",
            "BEGIN",  # never committed: nothing has to outlive the connection
        ):
            self._database.execute(statement)

    def add(self, key: str, value: str = "") -> None:
        """Append `value` to those of `key`. Raises DataError when the temporary folder is full."""
        try:
            self._database.execute("INSERT INTO entries VALUES (?, ?)", (key, value))
        except sqlite3.Error as error:
            raise DataError(
                f"cannot keep an index in the temporary folder ({error}); set SQLITE_TMPDIR to a folder with more room"
            ) from error

    def add_new(self, key: str, value: str = "") -> bool:
        """Add the first value of `key`; False, and nothing is added, if it has one."""
        if key in self:
            return False
        self.add(key, value)
        return True

    def values(self, key: str) -> list[str]:
        """All values of `key` in the order they came."""
        return [
            value
            for (value,) in self._database.execute("SELECT value FROM entries WHERE key = ? ORDER BY rowid", (key,))
        ]

    def __contains__(self, key: str) -> bool:
        return self._database.execute("SELECT 1 FROM entries WHERE key = ? LIMIT 1", (key,)).fetchone() is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._database.close()

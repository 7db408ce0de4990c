# SPDX-License-Identifier: Apache-2.0
"""Runs logical forms of WikiSQL on SQLite, in memory.

No text of a model becomes SQL: a statement is put together from column numbers and this file's own words, values are
bound parameters, and the database takes no writes once it is filled.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from lora_megatron.metrics.sql_form import AGGREGATIONS, OPERATORS, Query, plain

MAX_COLUMNS = 1000
_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")


class Table:
    """One table of WikiSQL. A context manager.

    types: `real` columns compare as numbers, others as lower-case text, as the data set's own engine has it.
    rows: cells are text, numbers or None. Raises ValueError for rows of another width or other cells.
    """

    def __init__(self, header: Sequence[str], types: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        if not 0 < len(header) <= MAX_COLUMNS or len(types) != len(header):
            raise ValueError(f"{len(header)} columns and {len(types)} types")
        for row in rows:
            if not isinstance(row, list) or len(row) != len(header):
                raise ValueError(f"a row is not a list of {len(header)} cells")
            if any(type(cell) not in (str, int, float, type(None)) for cell in row):
                raise ValueError("a cell is not text, a number or null")
        self._index: dict[str, int] = {}
        for index, name in enumerate(header):
            self._index.setdefault(plain(name), index)
        self._real = [kind == "real" for kind in types]
        self._database = sqlite3.connect(":memory:", isolation_level=None)
        columns = ", ".join(f"col{i} {'REAL' if real else 'TEXT'}" for i, real in enumerate(self._real))
        self._database.execute(f"CREATE TABLE rows ({columns})")
        marks = ", ".join("?" * len(header))
        self._database.executemany(
            f"INSERT INTO rows VALUES ({marks})", [[_cell(cell) for cell in row] for row in rows]
        )
        self._database.execute("PRAGMA query_only = ON")

    def run(self, query: Query) -> list[Any] | None:
        """The values that `query` selects, in the order of the rows; None where it cannot run.

        It cannot where a column is not the table's, the operator is OP, or a value beside a number holds none.
        """
        if query.column not in self._index or any(column not in self._index for column, _, _ in query.conditions):
            return None
        selected = f"col{self._index[query.column]}"
        if query.aggregation:
            selected = f"{AGGREGATIONS[query.aggregation]}({selected})"
        where, values = [], []
        for column, operator, text in sorted(query.conditions):
            index = self._index[column]
            value = _number(text) if self._real[index] else text
            if value is None or OPERATORS[operator] == "OP":
                return None
            where.append(f"col{index} {OPERATORS[operator]} ?")
            values.append(value)
        statement = f"SELECT {selected} FROM rows" + (f" WHERE {' AND '.join(where)}" if where else "")
        with contextlib.suppress(sqlite3.Error, UnicodeEncodeError):  # half a surrogate pair cannot be bound
            return [value for (value,) in self._database.execute(statement, values)]
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._database.close()


def _cell(cell: Any) -> Any:
    if isinstance(cell, str):
        return cell.lower().encode("utf-8", "replace").decode("utf-8")
    return float(cell) if isinstance(cell, int) and abs(cell) >= 2**63 else cell


def _number(text: str) -> float | None:
    """A number as the data set's engine reads it: with commas for thousands, or the first one in the text."""
    with contextlib.suppress(ValueError):
        return float(text.replace(",", ""))
    found = _NUMBER.search(text)
    return float(found.group()) if found else None

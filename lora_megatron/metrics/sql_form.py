# SPDX-License-Identifier: Apache-2.0
"""WikiSQL's SQL text back into its logical form: a column, an aggregation, and conditions.

    SELECT COUNT(Notes) FROM table WHERE State = SOUTH AND No. > 4   ->   (notes, 3, {(state, 0, south), (no., 1, 4)})

The text names columns as the table does and quotes nothing, so a name or a value may hold `AND`, `=` or brackets. With
the table's columns known every way to read it is tried; what cannot be read is no query, and never an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

AGGREGATIONS = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
OPERATORS = ("=", ">", "<", "OP")
MAX_CHARACTERS = 2048  # longer than any query of the data set; what is longer is no query
_MOST_PIECES = 32  # between ANDs
_MOST_OPERATORS = 8  # tried in one piece
_MOST_STEPS = 1024  # a text made to have very many readings costs no more than this
_MOST_READINGS = 256
_QUERY = re.compile(r"SELECT\b\s*(?P<select>.*?)\s*\bFROM\s+table(?:\s+WHERE\b\s*(?P<where>.*))?", re.I | re.S)
_CONDITION = re.compile(r"(?P<column>.*?)(?:^|\s)(?P<operator>=|>|<|OP)(?:\s+|$)", re.I | re.S)
_AND = re.compile(r"\s+AND\s+", re.I)


@dataclass(frozen=True)
class Query:
    """A logical form. Columns are names as `plain` makes them: equal names cannot be told apart in a text."""

    column: str
    aggregation: int
    conditions: frozenset[tuple[str, int, str]]


def plain(text: object) -> str:
    """Lower case and single spaces: how WikiSQL compares values, and a text its columns."""
    return " ".join(str(text).lower().split())


def gold_query(header: Sequence[str], sel: int, agg: int, conds: Sequence[tuple[int, int, Any]]) -> Query:
    """The logical form of a WikiSQL record, its indices in range."""
    conditions = frozenset((plain(header[column]), operator, plain(value)) for column, operator, value in conds)
    return Query(plain(header[sel]), agg, conditions)


def readings(text: str, header: Sequence[str] | None = None) -> Iterator[Query]:
    """Every logical form that `text` may stand for, at most 256 of them; none if it is no query.

    header: the table's columns; a form with another column is none. Without it any name is a column, and a condition's
    ends at its first operator.
    """
    text = text.strip()
    match = _QUERY.fullmatch(text) if len(text) <= MAX_CHARACTERS else None
    if match is None:
        return
    columns = None if header is None else {plain(name) for name in header}
    selections = list(_selections(match["select"], columns))
    parts = [] if match["where"] is None else _AND.split(match["where"].strip())
    if not selections or len(parts) > _MOST_PIECES:
        return
    for conditions in islice(_conditions(parts, columns), _MOST_READINGS):
        for column, aggregation in selections:
            yield Query(column, aggregation, frozenset(conditions))


def _selections(text: str, columns: set[str] | None) -> Iterator[tuple[str, int]]:
    for number, name in enumerate(AGGREGATIONS):
        if number and text.upper().startswith(f"{name}(") and text.endswith(")"):
            inner = plain(text[len(name) + 1 : -1])
            if columns is None or inner in columns:
                yield inner, number
                if columns is None:
                    return
    if columns is None or plain(text) in columns:
        yield plain(text), 0


def _conditions(parts: Sequence[str], columns: set[str] | None) -> Iterator[tuple[tuple[str, int, str], ...]]:
    """Ways to read the pieces between ANDs; neighbours belong together where a name or a value holds an AND."""
    steps = 0

    def read(start: int, found: tuple[tuple[str, int, str], ...]) -> Iterator[tuple[tuple[str, int, str], ...]]:
        nonlocal steps
        if start == len(parts):
            yield found
        for stop in range(start + 1, len(parts) + 1):
            steps += 1
            if steps > _MOST_STEPS:
                return
            for condition in _condition(" AND ".join(parts[start:stop]), columns):
                yield from read(stop, (*found, condition))

    yield from read(0, ())


def _condition(text: str, columns: set[str] | None) -> Iterator[tuple[str, int, str]]:
    """(column, operator, value) for each operator in `text` that a column stands before."""
    end = 0
    for _ in range(_MOST_OPERATORS):
        match = _CONDITION.match(text, end)
        if match is None:
            return
        column = plain(text[: match.end("column")])
        if columns is None or column in columns:
            yield column, OPERATORS.index(match["operator"].upper()), plain(text[match.end() :])
            if columns is None:
                return
        end = match.end("operator")

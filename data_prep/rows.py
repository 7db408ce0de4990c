# SPDX-License-Identifier: Apache-2.0
"""What a preparer makes of a raw record, and the checks that every text passes on its way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_megatron.data.parquet import MAX_ROW_BYTES

_BYTES_PER_TEXT = 64  # what Arrow keeps beside a text is less


class LeftOut(Exception):
    """A record that the data set's own rules leave out, such as one without a label: counted, and no error."""


@dataclass(frozen=True)
class Row:
    """One example."""

    id: str
    context: str
    target: str
    references: Sequence[str]
    """All accepted texts for the context, `target` among them."""
    meta: str | None = None
    """JSON for scorers; of all rows of a data set or of none."""
    also_in: tuple[str, ...] = ()
    """Further splits that hold this row, such as `test_seen`."""
    split: str | None = None
    """Where it goes instead of its source's split; one of the source's `more_splits`."""


@dataclass(frozen=True)
class Source:
    """A raw file and how rows come out of it."""

    split: str
    path: Path
    records: Callable[[], Iterator[tuple[int, Any]]]
    """(line, record or BadRecord), from the beginning at each call."""
    rows: Callable[[Any, int], list[Row]]
    """The rows of a record and its number in the file, from 0. Raises ValueError for a bad one, or LeftOut."""
    more_files: tuple[Path, ...] = ()
    """Others that `records` reads."""
    more_splits: tuple[str, ...] = ()
    """Splits that some of the rows go to instead; one that gets none is an error, as with `split`."""


def as_object(record: Any, field: str | None = None) -> Mapping[str, Any]:
    """`record`, or the value of its `field`, if it is a JSON object. Raises ValueError."""
    if not isinstance(record, dict):
        kind = _kind(record)
        raise ValueError(f"{field} is {kind}, expected an object" if field else f"expected a JSON object, found {kind}")
    return record


def text_in(record: Mapping[str, Any], field: str, *, may_be_empty: bool = False) -> str:
    """The text that `field` holds. Raises ValueError when it is missing, no text, or only white space."""
    if field not in record:
        raise ValueError(f"{field} is missing")
    return checked_text(record[field], field, may_be_empty=may_be_empty)


def checked_text(value: Any, what: str, *, may_be_empty: bool = False) -> str:
    """`value` if it is a text that UTF-8 can hold. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is {_kind(value)}, expected text")
    if not may_be_empty and not value.strip():
        raise ValueError(f"{what} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds half a surrogate pair at character {error.start + 1}") from None
    return value


def list_in(record: Mapping[str, Any], field: str) -> list[Any]:
    """The list that `field` holds, with something in it. Raises ValueError."""
    value = record.get(field)
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"{field} is {_kind(value) if field in record else 'missing'}, expected a list that holds some"
        )
    return value


def check_size(row: Row) -> None:
    """Raise ValueError for a row that is larger than readers of prepared files take."""
    texts = [row.id, row.context, row.target, *row.references, row.meta or ""]
    size = sum(len(text.encode("utf-8")) + _BYTES_PER_TEXT for text in texts)
    if size > MAX_ROW_BYTES:
        raise ValueError(f"makes a row of {size} bytes, at most {MAX_ROW_BYTES} fit")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    if isinstance(value, list) and not value:
        return "an empty list"
    return names.get(type(value), "a number")

# SPDX-License-Identifier: Apache-2.0
"""WikiSQL's two accuracies: of the logical form, and of what the query gives on the table.

The column `meta` of prepared data has what they need: {"header", "types", "sel", "agg", "conds", "rows"}.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_megatron.errors import DataError
from lora_megatron.metrics.sql_form import AGGREGATIONS, OPERATORS, Query, gold_query, readings
from lora_megatron.metrics.sql_run import Table
from lora_megatron.metrics.sums import Sums, Unavailable, average
from lora_megatron.strict_json import NotStrictJson, parse_json

_KEYS = ("header", "types", "rows", "sel", "agg", "conds")


@dataclass(frozen=True)
class _Gold:
    header: list[str]
    types: list[str]
    query: Query
    rows: list[Any] | None


def sql_accuracies(
    predictions: Sequence[str], references: Sequence[Sequence[str]], metas: Sequence[str | None] | None
) -> dict[str, Sums | Unavailable]:
    """`logical_form` and `execution`, 0 to 100. A prediction that is no query of its table is wrong in both.

    logical_form: same column, aggregation and set of conditions, values compared in lower case and single spaces.
    Without `metas` the references' SQL is taken apart instead, which misreads names that hold AND or an operator.
    execution: the same values in the same order as the gold query gives; a right logical form is right here too.

    Raises DataError for a meta that is not WikiSQL's.
    """
    if metas is None or any(meta is None for meta in metas):
        forms = [_form_of_text(*pair) for pair in zip(predictions, references, strict=True)]
        reason = "running a query needs its table: give the column `meta` of the prepared data"
        return {"logical_form": average(forms), "execution": Unavailable(reason)}
    golds = [_gold(meta or "", number) for number, meta in enumerate(metas, start=1)]
    read = [list(readings(text, gold.header)) for text, gold in zip(predictions, golds, strict=True)]
    right = [gold.query in queries for queries, gold in zip(read, golds, strict=True)]
    without = [number for number, gold in enumerate(golds, start=1) if gold.rows is None]
    if without:
        reason = f"the meta of {len(without)} instances, first of number {without[0]}, has no rows of its table: "
        reason += "prepare validation or test again (train is prepared without)"
        return {"logical_form": average(right), "execution": Unavailable(reason)}
    gives = [
        same or _gives_the_same(queries, gold, number)
        for number, (same, queries, gold) in enumerate(zip(right, read, golds, strict=True), start=1)
    ]
    return {"logical_form": average(right), "execution": average(gives)}


def _form_of_text(prediction: str, references: Sequence[str]) -> bool:
    accepted = {query for text in references for query in readings(text)}
    return any(query in accepted for query in readings(prediction))


def _gives_the_same(queries: Sequence[Query], gold: _Gold, number: int) -> bool:
    if not queries:
        return False
    try:
        with Table(gold.header, gold.types, gold.rows or []) as table:
            wanted = table.run(gold.query)
            return wanted is not None and table.run(queries[0]) == wanted
    except ValueError as error:
        raise _bad(number, str(error)) from None


def _gold(meta: str, number: int) -> _Gold:
    record: Any
    try:
        record = parse_json(meta)
    except (json.JSONDecodeError, NotStrictJson, RecursionError) as error:
        raise _bad(number, f"not strict JSON ({error})") from None
    if not isinstance(record, dict):
        raise _bad(number, "not an object")
    fields: list[Any] = [record.get(key) for key in _KEYS]
    header, types, rows, sel, agg, conds = fields
    if not _texts(header) or not _texts(types) or len(header) != len(types):
        raise _bad(number, "header and types are not lists of as many texts")
    if rows is not None and not isinstance(rows, list):
        raise _bad(number, "rows is not a list")
    if not _in(sel, header) or not _in(agg, AGGREGATIONS) or not _conditions(conds, header):
        raise _bad(number, "sel, agg and conds are not those of a query on its header")
    return _Gold(header, types, gold_query(header, sel, agg, conds), rows)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _conditions(value: Any, header: Sequence[str]) -> bool:
    return isinstance(value, list) and all(
        isinstance(cond, list) and len(cond) == 3 and _in(cond[0], header) and _in(cond[1], OPERATORS) for cond in value
    )


def _in(index: Any, items: Sequence[Any]) -> bool:
    return type(index) is int and 0 <= index < len(items)


def _bad(number: int, reason: str) -> DataError:
    return DataError(f"the meta of instance {number} is not WikiSQL's: {reason}; prepare the data again")

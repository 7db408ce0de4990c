# SPDX-License-Identifier: Apache-2.0
"""WikiSQL: a table's columns and a question to SQL.

    context  columns: State/territory | Text/background colour | Notes
             question: Tell me what the notes are for South Australia
    target   SELECT Notes FROM table WHERE State/territory = SOUTH AUSTRALIA
    meta     {"table_id": "1-1000181-1", "header": [..], "types": [..], "sel": 2, "agg": 0, "conds": [[0, 0, "SOUTH"]]}

x = {table schema, query}, y = {SQL} are the LoRA paper's; how the two parts are written is ours. The SQL is WikiSQL's
own text form, with the columns' names. `meta` has what logical-form and execution accuracy need: in validation and test
also "rows", the table's cells, so that no .db file is; train is not executed and stays small without.
Tables are looked up on the disk, never all in memory.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.disk_index import DiskIndex
from data_prep.json_records import read_json_lines
from data_prep.options import add_options, files_of_splits, prepare
from data_prep.raw_files import BadRecord
from data_prep.rows import Row, Source, as_object, checked_text, list_in, text_in
from lora_megatron.errors import DataError

SPLIT_BY_FILE = {"train.jsonl": "train", "dev.jsonl": "validation", "test.jsonl": "test"}
AGGREGATIONS = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
OPERATORS = ("=", ">", "<", "OP")


def sql_text(header: list[str], sel: int, agg: int, conds: list[list[Any]]) -> str:
    """`SELECT COUNT(Player) FROM table WHERE No. = 42 AND Position = Guard`."""
    column = f"{AGGREGATIONS[agg]}({header[sel]})" if agg else header[sel]
    where = " AND ".join(f"{header[index]} {OPERATORS[operator]} {value}" for index, operator, value in conds)
    return f"SELECT {column} FROM table" + (f" WHERE {where}" if where else "")


def _rows(record: tuple[Any, dict[str, Any] | None], number: int, split: str) -> list[Row]:
    example, table = as_object(record[0]), record[1]
    table_id, question = text_in(example, "table_id"), text_in(example, "question").strip()
    if table is None:
        raise ValueError(f"table_id {table_id[:60]!r} is not in the tables file")
    header, sql = table["header"], as_object(example.get("sql"), "sql")
    sel, agg = _index(sql.get("sel"), "sel", len(header)), _index(sql.get("agg"), "agg", len(AGGREGATIONS))
    conds = _conditions(sql.get("conds"), len(header))
    target = sql_text(header, sel, agg, conds)
    meta = {"table_id": table_id, "header": header, "types": table["types"], "sel": sel, "agg": agg, "conds": conds}
    if "rows" in table:
        meta["rows"] = table["rows"]
    context = f"columns: {' | '.join(header)}\nquestion: {question}"
    return [Row(f"{split}-{number:06d}", context, target, [target], json.dumps(meta, ensure_ascii=False))]


def _conditions(conds: Any, columns: int) -> list[list[Any]]:
    if not isinstance(conds, list):
        raise ValueError("conds is not a list")
    for cond in conds:
        if not isinstance(cond, list) or len(cond) != 3:
            raise ValueError("a condition is not [column, operator, value]")
        _index(cond[0], "the column of a condition", columns)
        _index(cond[1], "the operator of a condition", len(OPERATORS))
        if type(cond[2]) is float and not math.isfinite(cond[2]):
            raise ValueError("the value of a condition is not finite")
        if type(cond[2]) not in (int, float):
            checked_text(cond[2], "the value of a condition", may_be_empty=True)
    return conds


def _index(value: Any, what: str, count: int) -> int:
    if type(value) is not int or not 0 <= value < count:  # `type is`: JSON's true is an int to Python
        raise ValueError(f"{what} is {str(value)[:20]!r}, expected an integer from 0 to {count - 1}")
    return value


def _table(record: Any, *, with_rows: bool) -> tuple[str, str]:
    """The id of a table, and its header, types and perhaps rows as JSON."""
    table = as_object(record)
    header, types = list_in(table, "header"), list_in(table, "types")
    for name in (*header, *types):
        checked_text(name, "a name or type of a column", may_be_empty=True)
    if len(header) != len(types):
        raise ValueError(f"header has {len(header)} columns, types has {len(types)}")
    kept = {"header": header, "types": types}
    if with_rows:
        kept["rows"] = _cells(table.get("rows"), len(header))
    return text_in(table, "id"), json.dumps(kept)


def _cells(rows: Any, columns: int) -> list[list[Any]]:
    if not isinstance(rows, list):
        raise ValueError("rows is not a list")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, list) or len(row) != columns:
            raise ValueError(f"row {number} is not a list of {columns} cells, as many as the header has")
        for cell in row:
            if isinstance(cell, str):
                checked_text(cell, f"a cell of row {number}", may_be_empty=True)
            elif type(cell) not in (int, float, type(None)):
                raise ValueError(f"a cell of row {number} is not text, a number or null")
    return rows


def _with_tables(path: Path, tables_path: Path, *, with_rows: bool) -> Iterator[tuple[int, Any]]:
    """(line, (example, what is kept of its table or None)) per example, after the bad lines of the tables file."""
    with DiskIndex() as tables:
        for line, record in read_json_lines(tables_path):
            try:
                if isinstance(record, BadRecord):
                    raise ValueError(record.reason)
                table_id, kept = _table(record, with_rows=with_rows)
                if not tables.add_new(table_id, kept):
                    raise ValueError(f"the table {table_id!r} is there twice")
            except ValueError as error:
                yield line, BadRecord(str(error), tables_path)
        for line, record in read_json_lines(path):
            if isinstance(record, BadRecord):
                yield line, record
                continue
            wanted = record.get("table_id") if isinstance(record, Mapping) else None
            found = tables.values(wanted) if isinstance(wanted, str) and wanted.isprintable() else []
            yield line, (record, json.loads(found[0]) if found else None)


def _source(split: str, path: Path) -> Source:
    tables = path.with_suffix(".tables.jsonl")
    if not tables.is_file():
        raise DataError(f"{tables} does not exist: {path.name} needs the tables that are published beside it")
    return Source(
        split,
        path,
        records=lambda: _with_tables(path, tables, with_rows=split != "train"),
        rows=lambda record, number: _rows(record, number, split),
        more_files=(tables,),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m data_prep wikisql`."""
    add_options(parser, raw=f"folder with {', '.join(SPLIT_BY_FILE)} (any of them) and their .tables.jsonl")


def run(arguments: argparse.Namespace) -> None:
    """Prepare the WikiSQL files of `arguments.raw` into `arguments.out`. Raises ConfigError or DataError."""
    found = files_of_splits(arguments.raw, SPLIT_BY_FILE, what="WikiSQL data (data.tar.bz2, unpacked)")
    prepare(arguments, [_source(split, path) for split, path in found], preparer="wikisql", with_meta=True)

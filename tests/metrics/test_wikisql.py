# SPDX-License-Identifier: Apache-2.0
"""Logical-form and execution accuracy, for queries as they should be and as a model may write them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_prep.wikisql import sql_text
from lora_megatron.data.parquet import open_examples
from lora_megatron.errors import DataError
from lora_megatron.metrics import sql_form
from lora_megatron.metrics.sql_form import Query, gold_query, readings
from lora_megatron.metrics.sql_run import Table
from lora_megatron.metrics.tasks import Scores, score
from tests.data.raw_samples import QUESTION, TABLE, lines, prepare, rows

HEADER = ["Player", "No.", "Position", "School AND Club = Team"]
TYPES = ["text", "real", "text", "text"]
ROWS = [
    ["Ann O'Neil", 42, "Guard", "A"],
    ["Bo", "1,200", "Guard", "B"],
    ["Cy", 7.5, "Forward", "A AND B"],
    ["Di", None, "Guard", "x = y"],
]
GOLD: dict[str, Any] = {"sel": 0, "agg": 0, "conds": [[2, 0, "Guard"], [1, 1, 10]]}
SQL = "SELECT Player FROM table WHERE Position = Guard AND No. > 10"


def meta(**changes: Any) -> str:
    return json.dumps({"header": HEADER, "types": TYPES, "rows": ROWS, **GOLD, **changes})


def scored(prediction: str, reference: str = SQL, **changes: Any) -> tuple[float, float]:
    """(logical form, execution) of one prediction."""
    found = score("wikisql", [prediction], [[reference]], metas=[meta(**changes)], bootstrap=0)
    return found.values["logical_form"], found.values["execution"]


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        (SQL, (100, 100)),
        ("select player from TABLE where no. > 10 and position =  GUARD ", (100, 100)),  # a set, in any case
        ("SELECT Player FROM table WHERE Position = Guard AND No. > 8", (0, 100)),  # another query, the same rows
        ("SELECT Player FROM table WHERE Position = Guard", (0, 0)),
        ("SELECT Player FROM table WHERE Position = Guard AND No. < 10", (0, 0)),
        ("SELECT No. FROM table WHERE Position = Guard AND No. > 10", (0, 0)),
        ("SELECT COUNT(Player) FROM table WHERE Position = Guard AND No. > 10", (0, 0)),
    ],
)
def test_right_and_wrong_queries(prediction: str, expected: tuple[float, float]) -> None:
    assert scored(prediction) == expected


HOSTILE = [
    "",
    " \n ",
    "I do not know.",
    "SELECT",
    "SELECT FROM table",
    "SELECT Player FROM table WHERE",
    "SELECT Player FROM table WHERE Position",
    "SELECT Player FROM table WHERE Position =",
    "SELECT Nobody FROM table WHERE Position = Guard",
    "SELECT Player FROM table WHERE Nothing = Guard",
    "SELECT Player FROM table; DROP TABLE rows; --",
    "SELECT Player FROM table WHERE Position = Guard'; DROP TABLE rows; --",
    "SELECT Player FROM table WHERE Position = ' OR '1'='1",
    'SELECT Player FROM table WHERE Position = " OR 1=1 --',
    "SELECT load_extension('x') FROM table",
    "SELECT col0 FROM rows",
    "SELECT Player FROM sqlite_master",
    "ATTACH DATABASE '/tmp/x' AS y",
    "SELECT MAX(MAX(Player)) FROM table",
    "SELECT Player FROM table WHERE No. > many",
    "SELECT Player FROM table WHERE No. OP 3",
    "SELECT Player FROM table WHERE No. > " + "9" * 400,
    "SELECT Player FROM table WHERE No. > nan",
    "SELECT Player FROM table WHERE Position = \0",
    "SELECT Player FROM table WHERE Position = \ud800",
    "SELECT Player FROM table UNION SELECT Player FROM table",
]


@pytest.mark.parametrize("prediction", HOSTILE)
def test_a_hostile_prediction_is_wrong_and_no_more(prediction: str) -> None:
    assert scored(prediction) == (0, 0)


@pytest.mark.parametrize(
    "prediction",
    [
        "SELECT Player FROM table WHERE " + " AND ".join(["Position = Guard"] * 100),
        "SELECT Player FROM table WHERE " + " AND ".join(["No. = No. = No. ="] * 31),
        "SELECT " + " " * 100_000,
        "SELECT" + " FROM table" * 180,
        "SELECT Player FROM table WHERE " + "= " * 1000,
        "SELECT Player FROM table WHERE " + "Position = a AND " * 31,
        "SELECT Player FROM table WHERE x AND " + " AND ".join(["Position = a"] * 31),
        "SELECT Player FROM table WHERE " + " AND ".join(["Position = a", "Nothing"] * 16),
    ],
)
def test_a_text_made_to_have_many_readings_takes_no_time(prediction: str) -> None:
    begin = time.process_time()
    assert scored(prediction) == (0, 0)
    assert time.process_time() - begin < 2


@settings(max_examples=100, deadline=None)
@given(
    st.text(max_size=60)
    | st.lists(st.sampled_from(["SELECT", "FROM", "table", "WHERE", "AND", "=", "a"])).map(" ".join)
)
def test_no_text_breaks_the_reader(text: str) -> None:
    for query in readings(text, ["a", "b"]):
        assert query.column in ("a", "b")
    list(readings(text))


pieces = st.lists(st.sampled_from(["a", "B", "=", "and", "(x)", "MAX(", "op", "3,5", "<", "'"]), min_size=1, max_size=4)
names = pieces.map(" ".join)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.lists(names, min_size=1, max_size=4))
def test_gold_sql_reads_back_whatever_the_names(data: st.DataObject, header: list[str]) -> None:
    """Even columns and values that hold AND, operators, or aggregations."""
    index, value = st.integers(0, len(header) - 1), names | st.integers(-9, 9) | st.floats(-9, 9)
    conds = data.draw(st.lists(st.tuples(index, st.integers(0, 2), value).map(list), max_size=3))
    sel, agg = data.draw(index), data.draw(st.integers(0, 5))
    assume(not any(str(part).strip().lower().startswith("and") for part in [*header, *(cond[2] for cond in conds)]))
    assume(not any(str(part).strip().lower().endswith("and") for part in [*header, *(cond[2] for cond in conds)]))
    text = sql_text(header, sel, agg, conds)
    assert gold_query(header, sel, agg, conds) in readings(text, header)


def test_names_that_hold_the_words_of_the_language() -> None:
    sql = "SELECT COUNT(School AND Club = Team) FROM table WHERE School AND Club = Team = A AND B"
    conds = [[3, 0, "A AND B"]]
    assert scored(sql, sql, sel=3, agg=3, conds=conds) == (100, 100)
    assert scored(sql.replace("COUNT", "MAX"), sql, sel=3, agg=3, conds=conds) == (0, 0)
    assert (
        scored("SELECT Player FROM table WHERE School AND Club = Team = x = y", sel=0, conds=[[3, 0, "x = y"]])[1]
        == 100
    )


def test_a_gold_query_that_cannot_run_makes_nothing_else_right() -> None:
    sql = "SELECT Player FROM table WHERE No. OP 4"
    assert scored(sql, sql, conds=[[1, 3, 4]]) == (100, 100)
    assert scored(sql.replace("4", "5"), sql, conds=[[1, 3, 4]]) == (0, 0)


def test_equal_column_names_cannot_be_told_apart() -> None:
    sql = "SELECT Goals FROM table"
    assert scored(sql, sql, header=["Goals", "goals"], types=["real"] * 2, rows=[[1, 2]], sel=1, conds=[]) == (100, 100)


def test_tables_compare_as_the_data_sets_engine_does() -> None:
    with Table(HEADER, TYPES, ROWS) as table:
        assert table.run(Query("player", 0, frozenset({("no.", 0, "1200")}))) == []  # `1,200` in a table is a text
        assert table.run(Query("player", 0, frozenset({("no.", 1, "forty 41 x")}))) == ["ann o'neil", "bo"]
        assert table.run(Query("no.", 4, frozenset())) == [
            50.5
        ]  # text counts as the number it begins with: 42 + 1 + 7.5
        assert table.run(Query("player", 3, frozenset({("player", 0, "ann o'neil")}))) == [1]
        assert table.run(Query("player", 0, frozenset({("position", 0, "guard"), ("position", 1, "a")}))) == [
            "ann o'neil",
            "bo",
            "di",
        ]
        assert table.run(Query("nobody", 0, frozenset())) is None
        with pytest.raises(Exception, match="readonly"):
            table._database.execute("DELETE FROM rows")


def test_without_tables_or_metas_execution_is_missing_by_name() -> None:
    text_only = score("wikisql", [SQL.lower(), "x"], [[SQL], [SQL]], bootstrap=10)
    assert text_only.values == {"logical_form": 50}
    assert "column `meta`" in text_only.unavailable["execution"]
    no_rows = score("wikisql", [SQL], [[SQL]], metas=[meta(rows=None)], bootstrap=0)
    assert no_rows.values == {"logical_form": 100}
    assert "no rows of its table" in no_rows.unavailable["execution"]


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "[]",
        '{"header": NaN}',
        "[" * 100_000,
        meta(header=[]),
        meta(header=["a"]),
        meta(types=None),
        meta(sel=4),
        meta(sel=True),
        meta(agg=-1),
        meta(conds=[[0, 0]]),
        meta(conds=[[9, 0, "x"]]),
        meta(rows=3),
        meta(rows=[[1]]),
        meta(rows=[[1, 2, 3, {}]]),
    ],
)
def test_a_damaged_meta_is_an_error_that_names_the_instance(damaged: str) -> None:
    with pytest.raises(DataError, match="meta of instance 2 is not WikiSQL's"):
        score("wikisql", [SQL, "SELECT Player FROM table"], [[SQL]] * 2, metas=[meta(), damaged], bootstrap=0)


def test_prepared_data_scores_itself_perfectly(tmp_path: Path) -> None:
    assert prepare("wikisql", tmp_path, {"dev.jsonl": lines(QUESTION), "dev.tables.jsonl": lines(TABLE)}) == 0
    table = open_examples(tmp_path / "out" / "validation.parquet", with_references=True)
    found: Scores = score(
        "wikisql",
        [target for _, _, target in table],
        [table.references(i) for i in range(len(table))],
        metas=[row["meta"] for row in rows(tmp_path, "validation")],
        bootstrap=0,
    )
    assert found.values == {"logical_form": 100, "execution": 100}


def test_the_limits_leave_room_for_the_data_set() -> None:
    """A text of every limit's size still reads; one above a limit does not."""
    value = "x" * 1900
    assert next(readings(f"SELECT a FROM table WHERE a = {value}", ["a"])).conditions == {("a", 0, value)}
    assert not list(readings(f"SELECT a FROM table WHERE a = {'x' * sql_form.MAX_CHARACTERS}", ["a"]))

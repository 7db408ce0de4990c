# SPDX-License-Identifier: Apache-2.0
"""DART, and what it shares with WebNLG: sets of triples to the sentences that express them.

    context  Mars Hill College | JOINED | 1973 && Mars Hill College | LOCATION | Mars Hill, North Carolina
    target   A school from Mars Hill, North Carolina, joined in 1973.

`ENTITY | RELATION | ENTITY` is how the LoRA paper writes a triple; ` && ` between triples is ours. Texts stay as
published. A set with several sentences makes several rows, each with all of them as its references.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.json_records import read_json_array
from data_prep.options import add_options, files_of_splits, prepare
from data_prep.rows import Row, Source, as_object, checked_text, list_in, text_in

WITHIN, BETWEEN = " | ", " && "
SPLIT_BY_FILE = {
    "dart-v1.1.1-full-train.json": "train",
    "dart-v1.1.1-full-dev.json": "validation",
    "dart-v1.1.1-full-test.json": "test",
}


def linearise(triples: Sequence[Sequence[Any]]) -> str:
    """`a | b | c && d | e | f` from [[a, b, c], [d, e, f]]. Raises ValueError when a triple is not three texts."""
    for number, triple in enumerate(triples, start=1):
        if not isinstance(triple, list | tuple) or len(triple) != 3:
            raise ValueError(f"triple {number} is not three texts")
        for part in triple:
            checked_text(part, f"a part of triple {number}")
    return BETWEEN.join(WITHIN.join(part.strip() for part in triple) for triple in triples)


def rows_of(
    row_id: str, context: str, sentences: Sequence[str], *, meta: str | None = None, also_in: tuple[str, ...] = ()
) -> list[Row]:
    """A row per sentence, `row_id` followed by its number."""
    return [
        Row(f"{row_id}-{number}", context, sentence, sentences, meta, also_in)
        for number, sentence in enumerate(sentences)
    ]


def _rows(record: Any, number: int, split: str) -> list[Row]:
    entry = as_object(record)
    context = linearise(list_in(entry, "tripleset"))
    sentences = [text_in(as_object(annotation), "text").strip() for annotation in list_in(entry, "annotations")]
    return rows_of(f"{split}-{number:06d}", context, sentences)


def _source(split: str, path: Path) -> Source:
    return Source(
        split,
        path,
        records=lambda: read_json_array(path),
        rows=lambda record, number: _rows(record, number, split),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m data_prep dart`."""
    add_options(parser, raw=f"folder with {', '.join(SPLIT_BY_FILE)} (any of them)")


def run(arguments: argparse.Namespace) -> None:
    """Prepare the DART files of `arguments.raw` into `arguments.out`. Raises ConfigError or DataError."""
    found = files_of_splits(arguments.raw, SPLIT_BY_FILE, what="JSON files of DART v1.1.1")
    prepare(arguments, [_source(split, path) for split, path in found], preparer="dart")

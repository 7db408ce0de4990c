# SPDX-License-Identifier: Apache-2.0
"""The E2E NLG Challenge: restaurant meaning representations (mr) and the sentences that express them (ref).

    mr       name[Alimentum], area[city centre], familyFriendly[no]
    context  name : Alimentum | area : city centre | familyFriendly : no
    target   There is a place in the city centre, Alimentum, that is not family-friendly.

The context has the linear form of the LoRA paper's GPT-2 experiments; slot names stay as the CSV files spell them.
A file is read twice: once to gather the sentences of equal mr on the disk, once to write the rows.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.csv_records import read_csv
from data_prep.disk_index import DiskIndex
from data_prep.options import add_options, files_of_splits, prepare
from data_prep.raw_files import BadRecord
from data_prep.rows import Row, Source, checked_text

COLUMNS = ("mr", "ref")
SPLIT_BY_FILE = {"trainset.csv": "train", "devset.csv": "validation", "testset_w_refs.csv": "test"}
WHAT = "E2E NLG Challenge CSV files"

# `|` separates pairs in the context; brackets and line ends cannot be told from syntax.
_PAIR = re.compile(r"([A-Za-z][A-Za-z0-9_ ]*)\[([^\[\]|\r\n]+)\]")


def parse_mr(mr: str) -> list[tuple[str, str]]:
    """Split `slot[value], slot[value]` into (slot, value) pairs; a value may hold commas and any currency sign.

    Raises ValueError saying what was expected and at which character.
    """
    pairs: list[tuple[str, str]] = []
    position = 0
    while True:
        match = _PAIR.match(mr, position)
        if match is None or not match[2].strip():
            raise ValueError(f"expected slot[value] at character {position + 1} of mr {mr[:120]!r}")
        pairs.append((match[1].strip(), match[2].strip()))
        position = match.end()
        if position == len(mr):
            return pairs
        if not mr.startswith(", ", position):
            raise ValueError(f"expected ', ' at character {position + 1} of mr {mr[:120]!r}")
        position += 2


def linearise(pairs: list[tuple[str, str]]) -> str:
    """`name : Alimentum | area : city centre` from (slot, value) pairs."""
    return " | ".join(f"{slot} : {value}" for slot, value in pairs)


def sources_of(raw: Path) -> list[Source]:
    """The E2E files that `raw` has. Raises DataError when it has none."""
    return [_source(split, path) for split, path in files_of_splits(raw, SPLIT_BY_FILE, what=WHAT)]


def _source(split: str, path: Path) -> Source:
    def rows(record: tuple[str, str, list[str]], number: int) -> list[Row]:
        mr, ref, references = record
        context = linearise(parse_mr(mr))
        return [Row(f"{split}-{number:06d}", context, checked_text(ref, "ref").strip(), references)]

    return Source(split, path, lambda: _with_references(path), rows)


def _with_references(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, (mr, ref, all sentences of this mr)) per record."""
    with DiskIndex() as sentences:
        for _, record in read_csv(path, COLUMNS):
            if not isinstance(record, BadRecord) and record[1].strip():
                sentences.add(record[0], record[1].strip())
        for line, record in read_csv(path, COLUMNS):
            yield line, record if isinstance(record, BadRecord) else (*record, sentences.values(record[0]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m data_prep e2e`."""
    add_options(parser, raw=f"folder with {', '.join(SPLIT_BY_FILE)} (any of them)")


def run(arguments: argparse.Namespace) -> None:
    """Prepare the E2E files of `arguments.raw` into `arguments.out`. Raises ConfigError or DataError."""
    prepare(arguments, sources_of(arguments.raw), preparer="e2e")

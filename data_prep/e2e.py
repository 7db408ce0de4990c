# SPDX-License-Identifier: Apache-2.0
"""The E2E NLG Challenge: restaurant meaning representations (mr) and the sentences that express them (ref).

    mr       name[Alimentum], area[city centre], familyFriendly[no]
    context  name : Alimentum | area : city centre | familyFriendly : no
    target   There is a place in the city centre, Alimentum, that is not family-friendly.

The context has the linear form of the LoRA paper's GPT-2 experiments; slot names stay as the CSV files spell them.
One split's references are held in memory to gather the ones of equal mr (the largest split has 9 MB); rows stream.
"""

from __future__ import annotations

import argparse
import re
from itertools import islice
from pathlib import Path

from data_prep.csv_records import read_csv
from data_prep.progress import print_summary, with_progress
from data_prep.rejects import RejectBudget
from data_prep.writer import DatasetWriter
from lora_megatron.errors import ConfigError, DataError

COLUMNS = ("mr", "ref")
SPLIT_BY_FILE = {"trainset.csv": "train", "devset.csv": "validation", "testset_w_refs.csv": "test"}

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


def write_splits(raw: Path, writer: DatasetWriter, *, limit: int | None, budget: RejectBudget) -> None:
    """Prepare every E2E file that `raw` has into `writer`; `limit` bounds the rows of each split.

    Raises DataError when `raw` has none of the files, or for bad records beyond the budget.
    """
    present = [name for name in SPLIT_BY_FILE if (raw / name).is_file()]
    if not present:
        expected = ", ".join(SPLIT_BY_FILE)
        raise DataError(f"{raw} has none of {expected}; give --raw the folder with the E2E NLG Challenge CSV files")
    for file_name in present:
        writer.add_source(raw / file_name)
        _write_split(raw / file_name, SPLIT_BY_FILE[file_name], writer, limit, budget)
    writer.rejected = budget.count


def _write_split(path: Path, split: str, writer: DatasetWriter, limit: int | None, budget: RejectBudget) -> None:
    references: dict[str, list[str]] = {}
    total = 0
    for _, (mr, ref) in islice(read_csv(path, COLUMNS), limit):
        references.setdefault(mr, []).append(ref.strip())
        total += 1
    records = with_progress(islice(read_csv(path, COLUMNS), limit), split, total)
    with writer.split(split) as rows:
        for number, (line, (mr, ref)) in enumerate(records):
            try:
                context = linearise(parse_mr(mr))
                if not ref.strip():
                    raise ValueError("ref is empty")
            except ValueError as error:
                budget.reject(path, line, str(error))
                continue
            accepted = [reference for reference in references[mr] if reference]
            rows.write(id=f"{split}-{number:06d}", context=context, target=ref.strip(), references=accepted)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m data_prep e2e`."""
    parser.add_argument("--raw", type=Path, required=True, help=f"folder with {', '.join(SPLIT_BY_FILE)} (any of them)")
    parser.add_argument("--out", type=Path, required=True, help="folder to create; must not exist or be empty")
    parser.add_argument("--limit", type=int, help="at most this many rows per split (default: all)")
    parser.add_argument("--max-rejected", type=int, default=0, help="bad records to skip before giving up (default: 0)")


def run(arguments: argparse.Namespace) -> None:
    """Prepare the E2E files of `arguments.raw` into `arguments.out`. Raises ConfigError or DataError."""
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit {arguments.limit} must be 1 or more")
    budget = RejectBudget(arguments.max_rejected)
    options = {"limit": arguments.limit, "max_rejected": arguments.max_rejected}
    with DatasetWriter(arguments.out, preparer="e2e", options=options) as writer:
        write_splits(arguments.raw, writer, limit=arguments.limit, budget=budget)
    print_summary(writer, arguments.out)

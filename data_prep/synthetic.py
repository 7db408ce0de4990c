# SPDX-License-Identifier: Apache-2.0
"""A corpus for the quickstart: written in the E2E challenge's CSV format, then prepared like the real one.

Every choice is a SHA-256 of the seed and of the thing chosen, so one seed gives the same bytes on every machine and
Python version. No mr appears twice, so none is in two splits.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Mapping
from itertools import count, islice
from pathlib import Path

from data_prep import e2e
from data_prep.grammar import DOMAINS, MOST_BYTES, Domain, Draws
from data_prep.pipeline import write_sources
from data_prep.rejects import RejectBudget
from data_prep.summary import print_summary
from data_prep.writer import DatasetWriter
from lora_megatron.errors import ConfigError

DEFAULT_ROWS = 4000
MOST_ROWS = 50_000
HELD_OUT_ROWS = 200


def write_raw_corpus(folder: Path, *, domain: Domain, seed: int, rows: int, held_out_rows: int) -> None:
    """Write trainset.csv with `rows` rows, devset.csv and testset_w_refs.csv with `held_out_rows` each."""
    pairs = distinct_pairs(domain, seed)
    folder.mkdir()
    sizes = {"devset.csv": held_out_rows, "testset_w_refs.csv": held_out_rows, "trainset.csv": rows}
    for file_name, size in sizes.items():  # held-out files first: they are the same for every number of rows
        with open(folder / file_name, "w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator="\n")
            writer.writerow(e2e.COLUMNS)
            writer.writerows(islice(pairs, size))


def distinct_pairs(domain: Domain, seed: int) -> Iterator[tuple[str, str]]:
    """Endless (mr, ref) pairs; no mr comes twice."""
    seen: set[str] = set()
    for index in count():
        draws = Draws(seed, index)
        meaning = domain.meaning(draws)
        mr, sentence = _mr(meaning), domain.sentence(meaning, draws)
        context = e2e.linearise(list(meaning.items()))
        if mr not in seen and len(context) + len(sentence) <= MOST_BYTES:
            seen.add(mr)
            yield mr, sentence


def _mr(meaning: Mapping[str, str]) -> str:
    return ", ".join(f"{slot}[{value}]" for slot, value in meaning.items())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m data_prep synthetic`."""
    parser.add_argument("--out", type=Path, required=True, help="folder to create; must not exist or be empty")
    parser.add_argument("--seed", type=int, required=True, help="any integer; the same seed gives the same bytes")
    parser.add_argument("--rows", type=int, default=DEFAULT_ROWS, help=f"training rows (default: {DEFAULT_ROWS})")
    parser.add_argument(
        "--held-out-rows", type=int, default=HELD_OUT_ROWS, help=f"rows of validation and of test ({HELD_OUT_ROWS})"
    )
    parser.add_argument("--domain", choices=sorted(DOMAINS), default="restaurants", help="default: restaurants")


def run(arguments: argparse.Namespace) -> None:
    """Write the corpus and its prepared form into `arguments.out`; the CSV files stay in its folder `raw`."""
    rows, held_out_rows = arguments.rows, arguments.held_out_rows
    for flag, value in (("--rows", rows), ("--held-out-rows", held_out_rows)):
        if not 1 <= value <= MOST_ROWS:
            raise ConfigError(f"{flag} {value} must be 1 to {MOST_ROWS}")
    options = {"domain": arguments.domain, "seed": arguments.seed, "rows": rows, "held_out_rows": held_out_rows}
    with DatasetWriter(arguments.out, preparer="synthetic", options=options) as writer:
        raw = writer.folder / "raw"
        domain = DOMAINS[arguments.domain]
        write_raw_corpus(raw, domain=domain, seed=arguments.seed, rows=rows, held_out_rows=held_out_rows)
        write_sources(writer, e2e.sources_of(raw), budget=RejectBudget())
    print_summary(writer, arguments.out)

# SPDX-License-Identifier: Apache-2.0
"""A corpus for the quickstart: written in the E2E challenge's CSV format, then prepared like the real one.

Every choice is a SHA-256 of the seed and of the thing chosen, so one seed gives the same bytes on every machine and
Python version. No mr appears in two splits.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from data_prep import e2e
from data_prep.grammar import DOMAINS, Domain
from data_prep.progress import print_summary
from data_prep.rejects import RejectBudget
from data_prep.writer import DatasetWriter
from lora_megatron.errors import ConfigError

DEFAULT_ROWS = 4000
REFERENCES_PER_MR = 3


def write_raw_corpus(folder: Path, *, domain: Domain, seed: int, rows: int) -> None:
    """Write trainset.csv with `rows` rows, devset.csv and testset_w_refs.csv with a twentieth (at least 12) each.

    Raises ConfigError when the domain has too few distinct meanings for so many rows.
    """
    meanings = sorted(domain.meanings(), key=lambda meaning: _draw(seed, "order", _mr(meaning)))
    pairs = _pairs(iter(meanings), domain, seed)
    held_out = max(12, rows // 20)
    folder.mkdir()
    for file_name, count in (("devset.csv", held_out), ("testset_w_refs.csv", held_out), ("trainset.csv", rows)):
        with open(folder / file_name, "w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator="\n")
            writer.writerow(e2e.COLUMNS)
            written = 0
            while written < count:
                group = next(pairs, None)
                if group is None:
                    raise ConfigError(f"--rows {rows} is more than the grammar has; use at most {_most_rows(domain)}")
                # A split takes whole groups (the last one cut short), which keeps the splits disjoint in mr.
                writer.writerows(group[: count - written])
                written += min(len(group), count - written)


def _pairs(meanings: Iterator[dict[str, str]], domain: Domain, seed: int) -> Iterator[list[tuple[str, str]]]:
    """One to three (mr, ref) pairs per meaning."""
    for meaning in meanings:
        mr = _mr(meaning)
        refs = sorted(domain.sentences(meaning), key=lambda ref: _draw(seed, "ref", ref))
        yield [(mr, ref) for ref in refs[: 1 + _draw(seed, "count", mr) % REFERENCES_PER_MR]]


def _most_rows(domain: Domain) -> int:
    # On average two references per mr; a tenth of the rows and some slack go to validation and test.
    return len(domain.meanings()) * 3 // 2


def _mr(meaning: Mapping[str, str]) -> str:
    return ", ".join(f"{slot}[{value}]" for slot, value in meaning.items())


def _draw(seed: int, purpose: str, text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/{text}".encode()).digest()[:8], "big")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m data_prep synthetic`."""
    parser.add_argument("--out", type=Path, required=True, help="folder to create; must not exist or be empty")
    parser.add_argument("--seed", type=int, required=True, help="any integer; the same seed gives the same bytes")
    parser.add_argument("--rows", type=int, default=DEFAULT_ROWS, help=f"training rows (default: {DEFAULT_ROWS})")
    parser.add_argument("--domain", choices=sorted(DOMAINS), default="restaurants", help="default: restaurants")


def run(arguments: argparse.Namespace) -> None:
    """Write the corpus and its prepared form into `arguments.out`; the CSV files stay in its folder `raw`."""
    if arguments.rows < 1:
        raise ConfigError(f"--rows {arguments.rows} must be 1 or more")
    options = {"domain": arguments.domain, "seed": arguments.seed, "rows": arguments.rows}
    with DatasetWriter(arguments.out, preparer="synthetic", options=options) as writer:
        raw = writer.folder / "raw"
        write_raw_corpus(raw, domain=DOMAINS[arguments.domain], seed=arguments.seed, rows=arguments.rows)
        e2e.write_splits(raw, writer, limit=None, budget=RejectBudget())
    print_summary(writer, arguments.out)

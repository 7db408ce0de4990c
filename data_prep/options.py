# SPDX-License-Identifier: Apache-2.0
"""The flags that every preparer of raw files has, and the run behind them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.lengths import Lengths
from data_prep.pipeline import write_sources
from data_prep.rejects import RejectBudget
from data_prep.rows import Source
from data_prep.summary import print_summary
from data_prep.writer import DatasetWriter
from lora_megatron.data.tokenizer import Tokenizer, load_tokenizer
from lora_megatron.errors import ConfigError, DataError


def add_options(parser: argparse.ArgumentParser, *, raw: str, raw_required: bool = True) -> None:
    """--raw, which `raw` describes, --out, and what bounds, draws and counts rows."""
    parser.add_argument("--raw", type=Path, required=raw_required, help=raw)
    parser.add_argument("--out", type=Path, required=True, help="folder to create; must not exist or be empty")
    parser.add_argument("--limit", type=int, help="at most this many rows per split, the first (default: all)")
    parser.add_argument("--low-data", type=int, metavar="N", help="only N rows of train, drawn at random by --seed")
    parser.add_argument("--seed", type=int, help="of --low-data: the same one draws the same rows (default: 0)")
    parser.add_argument("--max-rejected", type=int, default=0, help="bad records to skip before giving up (default: 0)")
    parser.add_argument("--tokenizer", help="count tokens with it: 'bytes', or a folder (default: count bytes of text)")
    parser.add_argument("--sequence-length", type=int, metavar="N", help="count rows longer than N tokens")


def prepare(
    arguments: argparse.Namespace,
    sources: Sequence[Source],
    *,
    preparer: str,
    with_meta: bool = False,
    more_options: Mapping[str, Any] | None = None,
    rendered_for: Tokenizer | None = None,
) -> None:
    """Write `sources` as the flags say and print the summary.

    more_options: further ones for the manifest. rendered_for: the tokenizer whose chat template renders the rows,
    which then counts their tokens.

    Raises ConfigError or DataError.
    """
    given = vars(arguments)
    for flag in ("limit", "low_data", "sequence_length"):
        if given[flag] is not None and given[flag] < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} {given[flag]} must be 1 or more")
    if arguments.seed is not None and arguments.low_data is None:
        raise ConfigError(f"--seed {arguments.seed} has nothing to draw: give --low-data N as well")
    if arguments.low_data is not None and all(source.split != "train" for source in sources):
        raise DataError(f"--low-data draws from train, and {arguments.raw or 'no --split'} has no training file")
    if arguments.sequence_length is not None and arguments.tokenizer is None and rendered_for is None:
        raise ConfigError(f"--sequence-length {arguments.sequence_length} counts tokens: give --tokenizer as well")
    tokenizer = rendered_for if arguments.tokenizer is None else load_tokenizer(arguments.tokenizer)
    if tokenizer and rendered_for and tokenizer.fingerprint != rendered_for.fingerprint:
        raise ConfigError(f"--tokenizer {arguments.tokenizer} is another one than that of --chat-template")
    lengths = Lengths(tokenizer, arguments.sequence_length, rendered=rendered_for is not None)
    budget = RejectBudget(arguments.max_rejected)
    options = {"limit": arguments.limit, "max_rejected": arguments.max_rejected, **(more_options or {})}
    seed = arguments.seed or 0
    if arguments.low_data is not None:
        options |= {"low_data": arguments.low_data, "seed": seed}
    fingerprint = None if rendered_for is None else rendered_for.fingerprint
    with DatasetWriter(
        arguments.out, preparer=preparer, options=options, with_meta=with_meta, rendered_for=fingerprint
    ) as writer:
        write_sources(
            writer,
            sources,
            budget=budget,
            limit=arguments.limit,
            low_data=arguments.low_data,
            seed=seed,
            lengths=lengths,
        )
    print_summary(writer, arguments.out, lengths)


def files_of_splits(raw: Path, names: Mapping[str, str], *, what: str) -> list[tuple[str, Path]]:
    """(split, path) of the files in the folder `raw` among `names` (file name -> split), in the order of `names`.

    Raises DataError when there is none; `what` says whose files they are.
    """
    found = [(split, raw / name) for name, split in names.items() if (raw / name).is_file()]
    if not found:
        raise DataError(f"{raw} has none of {', '.join(names)}; give --raw the folder with the {what}")
    return found

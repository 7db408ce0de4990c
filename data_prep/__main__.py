# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m data_prep <preparer> --out DIR ...`, one preparer per data set."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_prep import e2e, inspection, mnli, own_files, samsum, synthetic, triples, webnlg, wikisql
from lora_megatron.errors import EXIT_BROKEN_PIPE, EXIT_DONE, EXIT_INTERRUPTED, UserError


@dataclass(frozen=True)
class Preparer:
    """One subcommand: its flags, what it does, and a line to copy."""

    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    summary: str
    example: str


PREPARERS: dict[str, Preparer] = {
    "wikisql": Preparer(
        wikisql.add_arguments,
        wikisql.run,
        "WikiSQL: a table's columns and a question to SQL",
        "python -m data_prep wikisql --raw raw/wikisql/data --out data/wikisql",
    ),
    "mnli": Preparer(
        mnli.add_arguments,
        mnli.run,
        "MultiNLI: premise and hypothesis to a label, from its release or from GLUE's files",
        "python -m data_prep mnli --raw raw/multinli_1.0 --out data/mnli-1k --low-data 1000 --seed 1",
    ),
    "samsum": Preparer(
        samsum.add_arguments,
        samsum.run,
        "SAMSum: conversations to summaries",
        "python -m data_prep samsum --raw raw/samsum --out data/samsum",
    ),
    "e2e": Preparer(
        e2e.add_arguments,
        e2e.run,
        "E2E NLG Challenge: restaurant slot-value pairs to sentences",
        "python -m data_prep e2e --raw raw/e2e --out data/e2e",
    ),
    "dart": Preparer(
        triples.add_arguments,
        triples.run,
        "DART: sets of triples to sentences",
        "python -m data_prep dart --raw raw/dart --out data/dart --tokenizer data/gpt2 --sequence-length 512",
    ),
    "webnlg": Preparer(
        webnlg.add_arguments,
        webnlg.run,
        "WebNLG 2017: triples to text; the test set also by seen and unseen categories",
        "python -m data_prep webnlg --raw raw/webnlg_challenge_2017 --out data/webnlg",
    ),
    "jsonl": Preparer(
        own_files.add_jsonl_arguments,
        own_files.run_jsonl,
        "your own JSON Lines: prompt/completion, messages, text, or instruction/input/output",
        "python -m data_prep jsonl --raw chats.jsonl --out data/chats --chat-template path/to/model",
    ),
    "csv": Preparer(
        own_files.add_csv_arguments,
        own_files.run_csv,
        "your own CSV: prompt/completion, text, instruction/input/output, or the columns you name",
        "python -m data_prep csv --raw faq.csv --out data/faq --prompt-column question --completion-column answer",
    ),
    "inspect": Preparer(
        inspection.add_arguments,
        inspection.run,
        "show a prepared file: examples as tokens with what the loss counts, lengths, truncations",
        "python -m data_prep inspect data/e2e/train.parquet --tokenizer data/gpt2 --sequence-length 256",
    ),
    "synthetic": Preparer(
        synthetic.add_arguments,
        synthetic.run,
        "a small corpus in the E2E format from a seeded grammar; needs no download",
        "python -m data_prep synthetic --domain hotels --seed 1 --out data/hotels",
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser with one subcommand per entry of PREPARERS."""
    examples = "\n".join(f"  {preparer.example}" for preparer in PREPARERS.values())
    parser = argparse.ArgumentParser(
        prog="python -m data_prep",
        description="Turn a raw data set into checksummed Parquet files with a manifest.",
        epilog=f"examples:\n{examples}\n\nexit status: 0 done, 2 wrong flags, 3 bad or missing data, 130 interrupted",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="preparer", required=True, metavar="{" + ",".join(PREPARERS) + "}")
    for name, preparer in PREPARERS.items():
        command = commands.add_parser(
            name,
            help=preparer.summary,
            description=preparer.summary,
            epilog=f"example:\n  {preparer.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        preparer.add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one preparer; returns the exit status (see lora_megatron.errors)."""
    arguments = build_parser().parse_args(argv)
    try:
        PREPARERS[arguments.preparer].run(arguments)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (BrokenPipeError, SystemExit) as error:  # rich makes the one of the other
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at exit
        return EXIT_BROKEN_PIPE
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())

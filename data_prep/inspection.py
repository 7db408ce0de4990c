# SPDX-License-Identifier: Apache-2.0
"""`python -m data_prep inspect`: what training makes of a prepared file, before any of it is trained on.

Examples are the micro-batches of training, of one row each: their tokens, and in brackets those that the loss counts.
Lengths are counted over the whole file, before anything is cut: a context with its line end, a target with its end
token, and both.
"""

from __future__ import annotations

import argparse
import io
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import rich.progress
from rich.console import Console
from rich.text import Text

from data_prep.histogram import histogram, summary_of
from data_prep.token_view import escape, show_tokens
from lora_megatron.data.batches import BatchSource
from lora_megatron.data.examples import LOSSES, Loss, prompt_ids, target_ids, trim_example
from lora_megatron.data.parquet import ExampleTable, open_examples
from lora_megatron.data.tokenizer import Tokenizer, load_tokenizer
from lora_megatron.errors import ConfigError

_WIDTH_WITHOUT_TERMINAL = 120


@dataclass
class Counts:
    """Tokens of every row, and how many rows a sequence length cuts."""

    contexts: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    cut: int = 0
    """Rows that lose tokens."""
    cut_targets: int = 0
    """Those among them that lose some of what is learned."""

    @property
    def totals(self) -> list[int]:
        """Context and target of each row together."""
        return [context + target for context, target in zip(self.contexts, self.targets, strict=True)]


def count_tokens(table: ExampleTable, tokenizer: Tokenizer, *, sequence_length: int | None) -> Counts:
    """Tokenise the whole table, with a bar on stderr where that is a terminal."""
    counts = Counts()
    quiet, console = not sys.stderr.isatty(), Console(stderr=True)
    rows = rich.progress.track(table, "tokens", total=len(table), disable=quiet, console=console, transient=True)
    for _, context, target in rows:
        prompt = prompt_ids(context, tokenizer, rendered=table.rendered)
        answer = target_ids(target, tokenizer, rendered=table.rendered)
        counts.contexts.append(len(prompt))
        counts.targets.append(len(answer))
        if sequence_length is not None:
            trimmed = trim_example(prompt, answer, sequence_length)
            counts.cut += trimmed.truncated
            counts.cut_targets += len(trimmed.ids) - trimmed.target_start < len(answer)
    return counts


def training_row(source: BatchSource, row: int) -> tuple[list[int], list[bool]]:
    """The ids of a row as training has them, without padding, and which of them the loss counts."""
    batch = source.microbatch(row)
    mask = batch["loss_mask"][0].bool().tolist()
    used = len(mask) - mask[::-1].index(True)  # the last label that is no padding is the end token, and counts
    return [int(batch["tokens"][0, 0]), *batch["labels"][0, :used].tolist()], [False, *mask[:used]]


def show_examples(
    console: Console, table: ExampleTable, tokenizer: Tokenizer, *, rows: int, sequence_length: int, loss: Loss
) -> None:
    """Print the first `rows` rows as tokens."""
    head = table.first(rows)
    # In the file's order, a row at a time.
    source = BatchSource(head, tokenizer, sequence_length=sequence_length, micro_batch_size=1, loss=loss, shuffle=False)
    for row, (row_id, context, target) in enumerate(head):
        ids, learned = training_row(source, row)
        whole = len(prompt_ids(context, tokenizer, rendered=table.rendered))
        whole += len(target_ids(target, tokenizer, rendered=table.rendered))
        lost = f", {whole - len(ids):,} cut off" if whole > len(ids) else ""
        about = f"row {row}  {escape(row_id, marks='')}  {len(ids):,} tokens, {sum(learned):,} learned{lost}"
        console.print(Text(about, style="bold"))
        for line in show_tokens([tokenizer.token_text(i) for i in ids], learned, width=console.width):
            console.print(line, no_wrap=True, overflow="ignore", crop=False)
        console.print()


def show_lengths(console: Console, counts: Counts, *, sequence_length: int | None) -> None:
    """Print a histogram each of contexts, targets and both, and how many rows are cut."""
    everything = (("context", counts.contexts), ("target", counts.targets), ("total", counts.totals))
    for name, lengths in everything:
        console.print(Text.assemble((f"{name} tokens", "bold"), f"  {summary_of(lengths)}"))
        for line in histogram(lengths):
            console.print(Text(line))
        console.print()
    rows = len(counts.contexts)
    if sequence_length is None:
        console.print(Text(f"nothing is cut at --sequence-length {max(counts.totals) - 1} or more"))
        return
    share = f"{counts.cut:,} of {rows:,} rows ({counts.cut / rows:.1%})"
    lost = f"; {counts.cut_targets:,} of them lose the end of the target" if counts.cut else ""
    console.print(Text(f"truncated at {sequence_length}: {share}{lost}"))


def inspect(
    path: Path,
    *,
    tokenizer: Tokenizer,
    rows: int = 3,
    sequence_length: int | None = None,
    loss: Loss = "target",
    stream: TextIO | None = None,
) -> None:
    """Print `rows` examples of a prepared file and the lengths of all, to `stream` (stdout).

    sequence_length: of training rows; without one nothing is cut.

    Raises DataError when the file or its manifest is missing or damaged, or was rendered for another tokenizer.
    """
    table = open_examples(path)
    table.check_tokenizer(tokenizer)
    stream = stream if stream is not None else sys.stdout
    width = None if stream.isatty() else _WIDTH_WITHOUT_TERMINAL
    console = Console(file=stream, width=width, highlight=False, emoji=False)
    counts = count_tokens(table, tokenizer, sequence_length=sequence_length)
    file = escape(str(path), marks="")
    console.print(Text(f"{file}  {len(table):,} rows, {sum(counts.totals):,} tokens by {escape(tokenizer.name)}"))
    console.print(Text("tokens¦that¦are¦read[and][learned]\n", style="dim"))
    if rows:
        length = sequence_length or max(counts.totals) - 1
        show_examples(console, table, tokenizer, rows=rows, sequence_length=length, loss=loss)
    show_lengths(console, counts, sequence_length=sequence_length)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m data_prep inspect`."""
    parser.add_argument("file", type=Path, metavar="FILE.parquet", help="as prepared; its manifest.json lies beside it")
    parser.add_argument("--tokenizer", required=True, help="'bytes', or a folder: that of training")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="how many examples to show (default: 3)")
    parser.add_argument("--sequence-length", type=int, metavar="N", help="of training: what is longer is cut")
    parser.add_argument("--loss", choices=LOSSES, default="target", help="what is learned (default: target)")


def run(arguments: argparse.Namespace) -> None:
    """Inspect `arguments.file`. Raises ConfigError or DataError."""
    if arguments.rows < 0:
        raise ConfigError(f"--rows {arguments.rows} must be 0 or more")
    if arguments.sequence_length is not None and arguments.sequence_length < 1:
        raise ConfigError(f"--sequence-length {arguments.sequence_length} must be 1 or more")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that has no such letter still shows the rest
    inspect(
        arguments.file,
        tokenizer=load_tokenizer(arguments.tokenizer),
        rows=arguments.rows,
        sequence_length=arguments.sequence_length,
        loss=arguments.loss,
    )

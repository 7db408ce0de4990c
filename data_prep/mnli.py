# SPDX-License-Identifier: Apache-2.0
"""MultiNLI: does a premise entail a hypothesis? From the JSON Lines of its release, or GLUE's tab-separated files.

    context  premise: Your gift is appreciated by each and every student.
             hypothesis: Hundreds of students will benefit from your generosity.
    target   neutral

The LoRA paper does not show its prompt; this one is ours. `validation` is dev_matched, `validation_mismatched` the
other. Pairs without a gold label (a label of `-`, on which annotators did not agree) are left out, as GLUE does.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.json_records import read_json_lines
from data_prep.options import add_options, files_of_splits, prepare
from data_prep.raw_files import BadRecord, read_lines
from data_prep.rows import LeftOut, Row, Source, as_object, text_in
from lora_megatron.errors import DataError

LABELS = ("entailment", "neutral", "contradiction")
RELEASE = {
    "multinli_1.0_train.jsonl": "train",
    "multinli_1.0_dev_matched.jsonl": "validation",
    "multinli_1.0_dev_mismatched.jsonl": "validation_mismatched",
}
GLUE = {"train.tsv": "train", "dev_matched.tsv": "validation", "dev_mismatched.tsv": "validation_mismatched"}
FIELDS = ("pairID", "sentence1", "sentence2", "gold_label")


def _rows(record: Any, number: int) -> list[Row]:
    pair = as_object(record)
    label = text_in(pair, "gold_label").strip()
    if label == "-":
        raise LeftOut("without a gold label")
    if label not in LABELS:
        raise ValueError(f"gold_label is {label[:40]!r}, expected one of {', '.join(LABELS)}, or -")
    premise, hypothesis = text_in(pair, "sentence1").strip(), text_in(pair, "sentence2").strip()
    return [Row(text_in(pair, "pairID"), f"premise: {premise}\nhypothesis: {hypothesis}", label, [label])]


def read_tsv(path: Path, fields: tuple[str, ...] = FIELDS) -> Iterator[tuple[int, Any]]:
    """Yield (line, {field: text} or BadRecord) of GLUE's format: no quoting, a tab always separates.

    Raises DataError when the first line does not name `fields`.
    """
    positions: dict[str, int] = {}
    width = 0
    for number, line in read_lines(path):
        if isinstance(line, BadRecord):
            yield number, line
            continue
        values = line.split("\t")
        if not positions:
            if missing := [field for field in fields if values.count(field) != 1]:
                raise DataError(f"{path}:{number}: the first line must name {', '.join(missing)}; is this GLUE's file?")
            positions, width = {field: values.index(field) for field in fields}, len(values)
        elif len(values) != width:
            yield number, BadRecord(f"{len(values)} fields, the first line has {width}")
        else:
            yield number, {field: values[position] for field, position in positions.items()}
    if not positions:
        raise DataError(f"{path} is empty; expected {', '.join(fields)} in its first line")


def _source(split: str, path: Path) -> Source:
    read = read_tsv if path.suffix == ".tsv" else read_json_lines
    return Source(split, path, records=lambda: read(path), rows=_rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m data_prep mnli`."""
    add_options(parser, raw=f"folder with {', '.join(RELEASE)}, or GLUE's {', '.join(GLUE)} (any of them)")


def run(arguments: argparse.Namespace) -> None:
    """Prepare the MultiNLI files of `arguments.raw` into `arguments.out`. Raises ConfigError or DataError."""
    raw: Path = arguments.raw
    names = RELEASE if any((raw / name).is_file() for name in RELEASE) else GLUE
    if names is GLUE and not any((raw / name).is_file() for name in GLUE):
        names = RELEASE | GLUE  # for the message
    found = files_of_splits(raw, names, what="files of MultiNLI 1.0, or GLUE's of MNLI")
    prepare(arguments, [_source(split, path) for split, path in found], preparer="mnli")

# SPDX-License-Identifier: Apache-2.0
"""SAMSum: messenger conversations to summaries. The files are JSON arrays and are read an element at a time.

    context  Amanda: I baked cookies. Do you want some?\\nJerry: Sure!\\n
    target   Amanda baked cookies and will bring Jerry some.

The LoRA paper's context is the utterances joined by "\\n", followed by "\\n\\n". A prompt gets one line end of its own
before the target (lora_megatron.data.examples), so the stored context ends with the first of the two.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from data_prep.json_records import read_json_array
from data_prep.options import add_options, files_of_splits, prepare
from data_prep.rows import Row, Source, as_object, text_in

SPLIT_BY_FILE = {"train.json": "train", "val.json": "validation", "test.json": "test"}


def join_utterances(dialogue: str) -> str:
    """One utterance a line, whatever ends the lines of the raw text; empty ones are dropped."""
    lines = dialogue.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _rows(record: Any, number: int) -> list[Row]:
    conversation = as_object(record)
    context = join_utterances(text_in(conversation, "dialogue")) + "\n"
    summary = text_in(conversation, "summary").strip()
    return [Row(text_in(conversation, "id"), context, summary, [summary])]


def _source(split: str, path: Path) -> Source:
    return Source(split, path, records=lambda: read_json_array(path), rows=_rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m data_prep samsum`."""
    add_options(parser, raw=f"folder with {', '.join(SPLIT_BY_FILE)} (any of them)")


def run(arguments: argparse.Namespace) -> None:
    """Prepare the SAMSum files of `arguments.raw` into `arguments.out`. Raises ConfigError or DataError."""
    found = files_of_splits(arguments.raw, SPLIT_BY_FILE, what="SAMSum corpus (corpus.7z, unpacked)")
    prepare(arguments, [_source(split, path) for split, path in found], preparer="samsum")

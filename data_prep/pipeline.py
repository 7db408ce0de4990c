# SPDX-License-Identifier: Apache-2.0
"""From raw files to splits, a row at a time: checks, rejects, limits and low-data subsets, alike for all data sets.

A low-data subset is drawn by the SHA-256 of the seed and a row's id: uniform, the same on every machine, and with one
seed the rows of MNLI-100 are among those of MNLI-1k. It takes two passes and the memory of what is drawn.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby, islice

from data_prep.disk_index import DiskIndex
from data_prep.lengths import Lengths
from data_prep.raw_files import BadRecord
from data_prep.rejects import RejectBudget
from data_prep.rows import LeftOut, Row, Source, check_size
from data_prep.writer import DatasetWriter, SplitWriter
from lora_megatron.errors import DataError, UserError


def write_sources(
    writer: DatasetWriter,
    sources: Sequence[Source],
    *,
    budget: RejectBudget,
    limit: int | None = None,
    low_data: int | None = None,
    seed: int = 0,
    lengths: Lengths | None = None,
) -> None:
    """Write the splits of `sources`; those of one split stand next to each other.

    limit: at most so many rows per split, the first ones. low_data: then so many rows of `train` only, drawn by `seed`.

    Raises DataError for an empty split, too few rows to draw from, or bad records beyond the budget.
    """
    lengths = lengths or Lengths()
    for source in sources:
        for path in (source.path, *source.more_files):
            writer.add_source(path)
    for split, group in groupby(sources, key=lambda source: source.split):
        parts = list(group)
        drawn, left_out, before = None, writer.left_out, budget.count
        if split == "train" and low_data is not None:
            drawn = _draw(_accepted(parts, budget, left_out, limit), low_data, seed)
            budget.pass_over(budget.count - before)  # the second pass finds the same ones
            left_out = Counter()
        more_splits = sorted({name for source in parts for name in source.more_splits})
        rows = _accepted(parts, budget, left_out, limit)
        _write(writer, split, rows, drawn, lengths, more_splits=more_splits)
    writer.rejected = budget.count


def _accepted(
    sources: Sequence[Source], budget: RejectBudget, left_out: Counter[str], limit: int | None
) -> Iterator[Row]:
    return islice(_every(sources, budget, left_out), limit)


def _every(sources: Sequence[Source], budget: RejectBudget, left_out: Counter[str]) -> Iterator[Row]:
    with DiskIndex() as ids:
        for source in sources:
            before = 0  # the line of the record before
            for number, (line, record) in enumerate(source.records()):
                path, where = source.path, f"record {number + 1} of the file: " if line == before else ""
                before = line
                try:
                    if isinstance(record, BadRecord):
                        path = record.path or path
                        raise ValueError(record.reason)
                    rows = source.rows(record, number)
                    for row in rows:
                        check_size(row)
                        if not ids.add_new(row.id):
                            raise ValueError(f"the id {row.id!r} is used before")
                except LeftOut as reason:
                    left_out[str(reason)] += 1
                except UserError:  # of the flags or of another file, not of this record
                    raise
                except ValueError as error:
                    budget.reject(path, line, f"{where}{error}")
                else:
                    yield from rows


def _draw(rows: Iterator[Row], count: int, seed: int) -> frozenset[int]:
    """The positions of `count` of the rows: those whose hash is lowest."""
    lowest: list[tuple[int, int]] = []  # a heap of (hash, position), both negative, so that the highest goes first
    seen = 0
    for seen, row in enumerate(rows, start=1):
        digest = hashlib.sha256(f"{seed}/{row.id}".encode()).digest()
        entry = (-int.from_bytes(digest, "big"), 1 - seen)
        if len(lowest) < count:
            heapq.heappush(lowest, entry)
        else:
            heapq.heappushpop(lowest, entry)
    if seen < count:
        raise DataError(f"--low-data {count} asks for more rows than the {seen} that there are")
    return frozenset(-position for _, position in lowest)


def _write(
    writer: DatasetWriter,
    split: str,
    rows: Iterator[Row],
    drawn: frozenset[int] | None,
    lengths: Lengths,
    *,
    more_splits: Sequence[str],
) -> None:
    with ExitStack() as stack:
        opened = (split, *more_splits)
        outputs: dict[str, SplitWriter] = {name: stack.enter_context(writer.split(name)) for name in opened}
        for position, row in enumerate(rows):
            if drawn is not None and position not in drawn:
                continue
            for name in (row.split or split, *row.also_in):
                if name not in outputs:
                    outputs[name] = stack.enter_context(writer.split(name))
                outputs[name].write(
                    id=row.id, context=row.context, target=row.target, references=list(row.references), meta=row.meta
                )
                lengths.add(name, row.context, row.target)

# SPDX-License-Identifier: Apache-2.0
"""Records of a CSV file as a stream: strict UTF-8, strict quoting, bounded lines, each with its line number."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.raw_files import BadRecord, open_raw
from lora_megatron.errors import DataError

MAX_LINE_BYTES = 2**20


def read_csv(
    path: Path, columns: Sequence[str], *, delimiter: str = ","
) -> Iterator[tuple[int, list[str] | BadRecord]]:
    """Yield (line number, the values of `columns`) per record, in constant memory.

    The first record is the header and must hold `columns`, in any order, quoted or not. The line number is the
    record's first line, counted from 1. A record with a wrong number of fields comes as a BadRecord. Raises DataError
    with file and line for what leaves unclear where the next record begins: bytes that are not UTF-8, broken quoting, a
    line above 1 MiB.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(_lines(path), strict=True, delimiter=delimiter)
    positions: list[int] = []
    width = previous_end = 0
    try:
        for record in reader:
            line, previous_end = previous_end + 1, reader.line_num
            if not record:
                continue  # csv gives an empty list for an empty line
            if not positions:
                positions, width = _positions(path, record, columns), len(record)
                continue
            if len(record) != width:
                yield line, BadRecord(f"{len(record)} fields, the header has {width}; is a quote missing?")
                continue
            yield line, [record[position] for position in positions]
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not valid CSV ({error}); mend the line") from error
    if not positions:
        raise DataError(f"{path} is empty; expected a CSV file with the columns {','.join(columns)}")


def _positions(path: Path, header: list[str], columns: Sequence[str]) -> list[int]:
    missing = [column for column in columns if header.count(column) != 1]
    if missing:
        raise DataError(f"{path}:1: the header is {header}, expected the columns {','.join(columns)} once each")
    return [header.index(column) for column in columns]


def read_header(path: Path, *, delimiter: str = ",") -> list[str]:
    """The fields of the first record. Raises DataError as `read_csv` does."""
    try:
        return next(csv.reader(_lines(path), strict=True, delimiter=delimiter), [])
    except csv.Error as error:
        raise DataError(f"{path}:1: not valid CSV ({error}); mend the line") from error


def _lines(path: Path) -> Iterator[str]:
    # Decoded line by line, because a text stream's UnicodeDecodeError does not say which line it was.
    with open_raw(path) as stream:
        number = 0
        while raw := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                raise DataError(f"{path}:{number}: longer than {MAX_LINE_BYTES} bytes; is this a CSV file?")
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: byte {error.start + 1} is not UTF-8; convert the file to UTF-8"
                ) from error

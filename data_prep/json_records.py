# SPDX-License-Identifier: Apache-2.0
"""Records of JSON Lines files and of JSON arrays as streams, read strictly, each with its line number.

Both hold one record at a time in memory. A bad line of a JSON Lines file is one bad record. In an array, a record that
JSON allows and we do not (a key twice, NaN) is one too; where the text is no JSON nothing tells where the next record
begins, and reading ends.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.raw_files import BLOCK_BYTES, MAX_RECORD_BYTES, BadRecord, open_raw, read_lines
from lora_megatron.errors import DataError
from lora_megatron.strict_json import NotStrictJson, parse_json


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value or BadRecord) per line that is not blank.

    Raises DataError when the file cannot be read.
    """
    for number, line in read_lines(path):
        if isinstance(line, BadRecord):
            yield number, line
        elif line.strip():
            yield number, _strictly(line)


def read_json_array(path: Path, *, inside: str | None = None) -> Iterator[tuple[int, Any]]:
    """Yield (the line it begins in, value or BadRecord) per element of the array that the file is.

    inside: the file is an object with this one key, and the array is its value.

    Raises DataError with file and line where the text is not JSON, not that array, or has an element above 4 MiB.
    """
    with open_raw(path) as stream:
        text = _Window(path, stream)
        for symbol in ("{", f'"{inside}"', ":") if inside else ():
            text.take(symbol)
        text.take("[")
        more = text.peek() != "]"
        while more:
            text.peek()
            yield text.line, _strictly(text.take_value())
            more = text.peek() == ","
            if more:
                text.take(",")
        text.take("]")
        if inside:
            text.take("}")
        if text.peek():
            raise text.error("something follows the end of the array")


def _strictly(text: str) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        return BadRecord(f"not valid JSON ({error.msg} at character {error.colno})")
    except NotStrictJson as error:
        return BadRecord(f"not strict JSON: {error}")
    except RecursionError:
        return BadRecord("nested too deeply")


def _unread(_: str) -> None:
    """For numbers: finding where an element ends must not fail over how large one is."""


class _Window:
    """The part of a text file that is being looked at; `line` is where it begins, counted from 1."""

    _extent = json.JSONDecoder(parse_int=_unread, parse_float=_unread, parse_constant=_unread)

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.line = 1
        self._path, self._stream = path, stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._ended = "", 0, False

    def peek(self) -> str:
        """The next character that is not white space, which is passed over; "" at the end of the file."""
        while True:
            rest = self._text[self._at :].lstrip(" \t\r\n")
            self._advance(len(self._text) - len(rest))
            if rest or self._ended:
                return rest[:1]
            self._fill()

    def take(self, symbol: str) -> None:
        """Pass over `symbol`, which must come next."""
        self.peek()
        while len(self._text) - self._at < len(symbol) and not self._ended:
            self._fill()
        if not self._text.startswith(symbol, self._at):
            found = self._text[self._at : self._at + 20]
            raise self.error(f"expected {symbol} and found {found!r}" if found else f"ends where {symbol} is expected")
        self._advance(self._at + len(symbol))

    def take_value(self) -> str:
        """The text of the JSON value that comes next."""
        self.peek()
        while True:
            problem, end = "", len(self._text)
            try:
                _, end = self._extent.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                line = self.line + self._text.count("\n", self._at, error.pos)
                problem = f"not valid JSON ({error.msg})"
            except RecursionError:
                raise self.error("nested too deeply") from None
            if not problem and (end < len(self._text) or self._ended):  # a number may go on in the next block
                value = self._text[self._at : end]
                self._advance(end)
                return value
            if self._ended:
                raise self.error(problem, line)
            if len(self._text) - self._at > MAX_RECORD_BYTES:
                # What is no JSON is so after the next block as well.
                raise self.error(f"{problem or 'a number'}, or a record of more than {MAX_RECORD_BYTES} characters")
            self._fill()

    def error(self, reason: str, line: int | None = None) -> DataError:
        """One line that says where the text is not what it should be."""
        return DataError(f"{self._path}:{line or self.line}: {reason}; mend the file")

    def _advance(self, to: int) -> None:
        self.line += self._text.count("\n", self._at, to)
        self._at = to

    def _fill(self) -> None:
        # As much again as there is: an element over many blocks is tried a few times only.
        block = self._stream.read(max(BLOCK_BYTES, len(self._text) - self._at))
        self._ended = not block
        try:
            more = self._decoder.decode(block, final=self._ended)
        except UnicodeDecodeError as error:
            line = self.line + self._text.count("\n", self._at) + block.count(b"\n", 0, error.start)
            raise self.error("not UTF-8", line) from error
        self._text, self._at = self._text[self._at :] + more, 0

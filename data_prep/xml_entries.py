# SPDX-License-Identifier: Apache-2.0
"""Elements of an XML file as a stream. No document type declaration is read, so there are no entities to expand.

XML can ask a reader to open other files and to multiply a text a billion times; both need a declaration at the top of
the file, and a data file has no use for one. The five entities of XML itself (&amp; &lt; ...) are text as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from data_prep.raw_files import BLOCK_BYTES, MAX_RECORD_BYTES, open_raw
from lora_megatron.errors import DataError, UserError

_DEEPEST = 32


@dataclass
class Element:
    """A tag with its attributes, its own text and what is in it."""

    tag: str
    attributes: dict[str, str]
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def find_all(self, tag: str) -> Iterator[Element]:
        """Every element of that name in this one, at any depth, in order."""
        for child in self.children:
            if child.tag == tag:
                yield child
            yield from child.find_all(tag)


def read_xml(path: Path, tag: str) -> Iterator[tuple[int, Element]]:
    """Yield (the line it begins in, element) per `tag` that is not inside another, in memory of one element.

    Raises DataError with file and line for what is not XML, a document type declaration, nesting deeper than 32, or an
    element above 4 MiB.
    """
    reader = _Reader(path, tag)
    with open_raw(path) as stream:
        while block := stream.read(BLOCK_BYTES):
            yield from reader.feed(block)
        yield from reader.feed(b"", last=True)


class _Reader:
    def __init__(self, path: Path, tag: str) -> None:
        self._path, self._tag = path, tag
        self._open: list[Element] = []  # the element that is being read and those in it that are open
        self._depth = self._fed = self._line = self._begin = 0
        self._done: list[tuple[int, Element]] = []
        self._parser = expat.ParserCreate()
        self._parser.buffer_text = True
        self._parser.StartDoctypeDeclHandler = self._refuse_declaration
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._characters

    def feed(self, block: bytes, *, last: bool = False) -> list[tuple[int, Element]]:
        """The elements that end in `block`."""
        self._fed += len(block)
        try:
            self._parser.Parse(block, last)
        except expat.ExpatError as error:
            reason = expat.ErrorString(error.code)
            raise DataError(f"{self._path}:{error.lineno}: not well-formed XML ({reason}); mend the file") from error
        except UserError:
            raise
        except (LookupError, ValueError, TypeError) as error:  # what Python's codecs say to expat about a name
            raise DataError(f"{self._path}: its encoding cannot be read; convert the file to UTF-8") from error
        # Neither an element nor a single tag may grow without end.
        begin = self._begin if self._open else max(self._parser.CurrentByteIndex, 0)
        if self._fed - begin > MAX_RECORD_BYTES + BLOCK_BYTES:
            raise self._error(f"something longer than {MAX_RECORD_BYTES} bytes")
        done, self._done = self._done, []
        return done

    def _error(self, reason: str) -> DataError:
        return DataError(f"{self._path}:{self._parser.CurrentLineNumber}: {reason}; is this file from the data set?")

    def _refuse_declaration(self, *_: object) -> None:
        raise self._error("a document type declaration, which can read other files and expand without end, is refused")

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._error(f"elements are nested more than {_DEEPEST} deep")
        if not self._open and tag != self._tag:
            return
        element = Element(tag, attributes)
        if self._open:
            self._open[-1].children.append(element)
        else:
            self._line, self._begin = self._parser.CurrentLineNumber, self._parser.CurrentByteIndex
        self._open.append(element)

    def _end(self, _: str) -> None:
        self._depth -= 1
        if self._open:
            element = self._open.pop()
            if not self._open:
                self._done.append((self._line, element))

    def _characters(self, text: str) -> None:
        if self._open:
            self._open[-1].text += text

# SPDX-License-Identifier: Apache-2.0
"""Examples as a person reads them: tokens apart, what the loss counts in brackets, and no character that could act.

A data file is written by others. A terminal obeys escape sequences, and some characters turn the direction of text or
are invisible, so whatever is not printable is shown as Python writes it (`\\x1b`, `\\u202e`). The signs that have
a meaning here get a backslash: itself, `¦` between tokens, `[` and `]` around those that are learned.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len, chop_cells
from rich.text import Text

LEARNED = ("black on green", "black on bright_green")
"""Alternately, so that the edges of tokens show."""
READ = ("default", "dim")
SEPARATOR = "¦"
_MARKS = f"\\{SEPARATOR}[]"


def escape(text: str, *, marks: str = _MARKS) -> str:
    """`text` with everything escaped that is not printable, and with a backslash before `marks`."""
    return "".join(_escape_one(character, marks) for character in text)


def _escape_one(character: str, marks: str) -> str:
    if character in marks:
        return "\\" + character
    if character.isprintable():
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def show_tokens(tokens: Sequence[str], learned: Sequence[bool], *, width: int) -> list[Text]:
    """`tokens¦that¦are¦read[and][learned]`, coloured where the terminal can, in lines of at most `width` columns.

    A line ends between tokens, and after one that is a line end itself; only a token wider than a line is cut.
    """
    lines = [Text()]
    for index, (token, counts) in enumerate(zip(tokens, learned, strict=True)):
        shown = f"[{escape(token)}]" if counts else escape(token)
        if not counts and index and not learned[index - 1]:
            shown = SEPARATOR + shown
        if lines[-1] and lines[-1].cell_len + cell_len(shown) > width:
            lines.append(Text())
        for number, part in enumerate(chop_cells(shown, width) or [shown]):  # nothing is made of what has no width
            if number:
                lines.append(Text())
            lines[-1].append(part, style=(LEARNED if counts else READ)[index % 2])
        if token.endswith("\n"):
            lines.append(Text())
    return lines if lines[-1] else lines[:-1]

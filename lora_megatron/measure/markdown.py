# SPDX-License-Identifier: Apache-2.0
"""Pieces of a report in Markdown. Text that a model generated is data: shown, never interpreted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_megatron.measure.units import show_bytes

_SYNTAX = re.compile(r"([\\`*_{}\[\]<>#|~&])")
_LONGEST_TEXT = 400


def printable(text: str) -> str:
    """`text` on one line, every character visible: generated text may hold terminal control codes."""
    shown = "".join(c if c.isprintable() else "⏎" if c == "\n" else "�" for c in text)
    return shown if len(shown) <= _LONGEST_TEXT else shown[:_LONGEST_TEXT] + "…"


def escape(text: str) -> str:
    """`text` as Markdown that renders as just that text, also inside a table."""
    return _SYNTAX.sub(r"\\\1", printable(text))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> list[str]:
    """Lines of a Markdown table; the first column is text, the others are numbers or text. Cells are escaped."""
    others = "---:" if numbers else "---"
    lines = [_row(columns), "|" + "|".join(["---", *[others] * (len(columns) - 1)]) + "|"]
    return [*lines, *(_row(row) for row in rows), ""]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(escape(cell) for cell in cells) + " |"


MEMORY_KINDS = ("weights", "gradients", "optimizer", "activations", "peak")


def memory_rows(memory_by_rank: Sequence[Mapping[str, Any]], *leading: str) -> list[list[str]]:
    """One row per rank: the `leading` cells, the rank, and the bytes of each kind.

    A GPU's peak, and activations by it, are measured in steps: without one, both are missing.
    """
    rows = []
    for rank in memory_by_rank:
        sizes = {**rank, "activations": None, "peak": None} if rank.get("peak") == 0 else rank
        rows.append([*leading, str(rank["rank"]), *(show_bytes(sizes.get(kind)) for kind in MEMORY_KINDS)])
    return rows


def samples(items: Sequence[Mapping[str, str | None]], texts: Mapping[str, str]) -> list[str]:
    """Lines that show each sample's context and, below it, the texts that `texts` names (key -> label)."""
    lines = []
    for item in items:
        lines.append(f"- **{escape(item['context'] or '')}**")
        found = ((label, item.get(key)) for key, label in texts.items())
        lines.extend(f"  - {label}: {escape(text)}" for label, text in found if text is not None)
    return [*lines, ""] if lines else []


def layout_text(layout: Mapping[str, Any]) -> str:
    """`tensor 2, data 1` from a layout's axes: those above 1, and sequence parallelism where it is on."""
    sizes = [f"{axis} {size}" for axis, size in layout.items() if not isinstance(size, bool) and size and size > 1]
    flags = [axis for axis, size in layout.items() if size is True]
    return ", ".join([*sizes, *flags]) or "one process"

# SPDX-License-Identifier: Apache-2.0
"""A report as one HTML file: its own style, no script, nothing loaded from anywhere; it opens from a disk for ever.

`write_html(folder, title, sections)` is all a command needs; `Html` is text that is markup already. Only the functions
of this module and the charts make it, and they escape whatever they are given.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_megatron.measure.atomic import write_text
from lora_megatron.measure.html_style import STYLE

HTML_NAME = "report.html"
_LONGEST_TEXT = 4000
_BLANK_LINES = re.compile(r"\n{2,}|^\n+|\n+$")
_NOTHING = "<em>nothing</em>"
# Even if a text got past the escaping, a browser would neither run nor fetch anything.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


class Html(str):
    """Markup; every other string is text."""


@dataclass(frozen=True)
class Section:
    """A part of a page, under a heading that the page's list of contents names."""

    title: str
    blocks: Sequence[Html]


def write_html(
    folder: Path, title: str, sections: Sequence[Section], *, subtitle: str = "", lead: Sequence[Html] = ()
) -> Path:
    """Write `report.html` into `folder`, whole or not at all; the same arguments give the same bytes.

    sections: those without blocks are left out. lead: what stands above the first heading, such as `tiles`.
    """
    path = folder / HTML_NAME
    write_text(path, _page(title, [section for section in sections if section.blocks], subtitle, lead))
    return path


def _page(title: str, sections: Sequence[Section], subtitle: str, lead: Sequence[Html]) -> str:
    links = "".join(f'<a href="#part-{i}">{escape(section.title)}</a>' for i, section in enumerate(sections, 1))
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<header>",
            f"<h1>{escape(title)}</h1>" + (f'\n<p class="subtitle">{escape(subtitle)}</p>' if subtitle else ""),
            f'<nav aria-label="Contents">{links}</nav>\n</header>\n<main>',
            *lead,
            *(_section(number, section) for number, section in enumerate(sections, 1)),
            "</main>\n<footer>Written by lora-megatron. One file, no script, nothing loaded from a network.</footer>",
            "</body>\n</html>\n",
        ]
    )


def _section(number: int, section: Section) -> str:
    heading = f'<h2 id="part-{number}">{escape(section.title)}</h2>'
    return "\n".join([f'<section aria-labelledby="part-{number}">', heading, *section.blocks, "</section>"])


def escape(text: str) -> Html:
    """`text` as markup that shows just that text; what cannot be printed, or turns the line around, shows as a sign."""
    cut = text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + "…"
    return Html(html.escape("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in cut)))


def paragraph(text: str, *, kind: str = "") -> Html:
    """A paragraph of text; kind: `note` (small), `warning` or `failure` (framed)."""
    role = ' role="alert"' if kind == "failure" else ""
    return Html(f'<p class="{escape(kind)}"{role}>{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True, caption: str = "") -> Html:
    """A table; the first column is text and heads its row, the others are numbers (aligned on the right) or text."""
    heads = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    lines = [f"<caption>{escape(caption)}</caption>"] if caption else []
    lines += [f"<thead><tr>{heads}</tr></thead>"] if any(columns) else []
    lines += ["<tbody>", *(_row(row) for row in rows), "</tbody>"]
    kind = "numbers" if numbers else "words"
    return Html(f'<div class="scroll"><table class="{kind}">' + "\n".join(lines) + "</table></div>")


def _row(cells: Sequence[str]) -> str:
    head, *others = cells
    return f'<tr><th scope="row">{escape(head)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in others) + "</tr>"


def tiles(values: Sequence[tuple[str, str, str]]) -> Html:
    """The numbers to see first: (what it is, the number, a remark below it) each."""
    items = (
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}<small>{escape(remark)}</small></dd></div>"
        for label, value, remark in values
    )
    return Html('<dl class="tiles">' + "".join(items) + "</dl>")


def side_by_side(*blocks: Html) -> Html:
    """Charts or tables in two columns where there is room."""
    return Html('<div class="grid">\n' + "\n".join(blocks) + "\n</div>")


def folded(title: str, *blocks: Html) -> Html:
    """What few readers want to see: folded away until the title is clicked."""
    return Html(f"<details><summary>{escape(title)}</summary>\n" + "\n".join(blocks) + "\n</details>")


def definitions(title: str, pairs: Mapping[str, str], *, marked: frozenset[str] = frozenset()) -> Html:
    """A titled list of keys and values; the values of the keys in `marked` stand out."""
    items = "".join(
        f"<dt>{escape(key)}</dt><dd>{_marked(value) if key in marked else escape(value)}</dd>"
        for key, value in pairs.items()
    )
    return Html(f'<div class="card"><h3>{escape(title)}</h3><dl class="pairs">{items}</dl></div>')


def _marked(value: str) -> str:
    return f"<strong>{escape(value)}</strong>"


def samples(items: Sequence[Mapping[str, str | None]], texts: Mapping[str, str]) -> list[Html]:
    """Each sample's context and, below it, the texts that `texts` names (key -> label); line breaks are kept."""
    blocks = []
    for item in items:
        found = ((label, item.get(key)) for key, label in texts.items())
        pairs = "".join(
            f"<dt>{escape(label)}</dt><dd>{_quoted(text)}</dd>" for label, text in found if text is not None
        )
        blocks.append(
            Html(f'<div class="card sample"><h3>{escape(item.get("context") or "")}</h3><dl>{pairs}</dl></div>')
        )
    return blocks


def _quoted(text: str) -> str:
    """Line breaks are kept, but for the many that an untrained model likes to write."""
    return escape(_BLANK_LINES.sub(lambda found: "⏎" * len(found[0]) + "\n", text)) if text.strip() else _NOTHING

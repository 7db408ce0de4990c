# SPDX-License-Identifier: Apache-2.0
"""Reading a page back as a browser does: every tag closed, nothing fetched, the pictures as XML."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

_VOID = {"meta"}
_FETCHING = {"src", "srcset", "data", "action", "background", "poster", "xlink:href", "ping"}


class Page(HTMLParser):
    """The text, headings and attributes of a page. Raises AssertionError where tags do not match."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = source
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.headings: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []
        self.pictures = [ElementTree.fromstring(picture) for picture in re.findall(r"<svg.*?</svg>", source, re.DOTALL)]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            assert name not in _FETCHING, f"{tag} has {name}"
            assert not name.startswith("on"), f"{tag} has {name}"
            assert name != "href" or (value or "").startswith("#"), f"{tag} leads to {value}"
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "h2":
            self.headings.append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "h2":
            self.headings[-1] += data

    def picture(self, title: str) -> ElementTree.Element:
        """The chart of that title."""
        found = [picture for picture in self.pictures if picture.findtext("title") == title]
        assert len(found) == 1, f"{len(found)} charts are called {title}"
        return found[0]


def read_page(source: str) -> Page:
    """A page that stands alone: no script, nothing fetched, no address but in text."""
    page = Page(source)
    assert not {"script", "link", "iframe", "img", "object", "embed", "base", "form"} & set(page.tags)
    assert "url(" not in source
    assert "@import" not in source
    return page

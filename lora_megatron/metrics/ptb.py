# SPDX-License-Identifier: Apache-2.0
"""Penn Treebank tokens, as the E2E script's COCO metrics see a text, without Java.

That script runs Stanford's PTBTokenizer 3.4.1 (`-preserveLines -lowerCase`) and drops punctuation:

    It isn't cheap (£20-25), e.g. "The Mill".   ->   it is n't cheap -lrb- # 20-25 -rrb- e.g. the mill

This is a small grammar of the same rules, so that a score does not depend on whether Java is there. A test compares the
two over the whole E2E development and test sets where Java is.
"""

from __future__ import annotations

import re

PUNCTUATION = frozenset(["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-"]) | frozenset(
    [".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
"""What COCO's evaluation drops. It lower-cases before, so that brackets (-lrb-) stay in fact, and here."""

_TITLES = "mr|mrs|ms|dr|prof|rev|gen|gov|sen|st|ave|blvd|rd|jr|sr|inc|co|corp|ltd|bros|vs|etc|dept|est|mt|ft"
_TOKEN = re.compile(
    rf"""
    (?:https?://|www\.)[^\s"<>()]*[^\s"<>().,;:!?']        # an address
  | [\w.+-]+@[\w-]+(?:\.[\w-]+)+                           # of mail
  | </?[A-Za-z][^<>]*>                                     # a tag
  | (?:[A-Za-z]\.){{2,}}(?!\w)                             # e.g.
  | [^\W\d]\w*(?:\.\w+)+                                   # the end.Another
  | \b(?:{_TITLES}|[A-Za-z])\.                             # Mr.
  | \bno\.(?=\s*\d)
  | [-+]?(?:\d+(?:[.,:]\d+)+|[.,]\d+|\d+(?!\w|[-/]\w))       # 1,000.5
  | n['’]t\b | ['’](?:s|m|d|re|ve|ll|n|em)\b | ['’]\d\ds?\b
  | \b(?:can(?=not\b)|gon(?=na\b)|got(?=ta\b)|wan(?=na\b))
  | [dloDLO]['’][^\W\d]\w+                                 # hors d'oeuvre
  | @?(?:(?!n['’]t\b)\w)+(?:[-/](?:(?!n['’]t\b)\w)+)*(?:\.(?=\s?[,;:]))?
  | \.{{3,}} | … | --+ | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)
_SPELLING = {
    **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
    **{"£": "#", "€": "$", "…": "...", "–": "--", "—": "--", "‘": "`", "’": "'", "“": "``", "”": "''", '"': "''"},
}


def ptb_tokens(text: str) -> list[str]:
    """The tokens of one line, lower-cased, without punctuation."""
    tokens = (_SPELLING.get(token, token).replace("’", "'").lower() for token in _TOKEN.findall(text))
    return [token for token in tokens if token not in PUNCTUATION]

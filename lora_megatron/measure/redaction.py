# SPDX-License-Identifier: Apache-2.0
"""Secrets out of what a report shows: by the name of the key they stand under, and by what they look like.

Configurations and environments of this project hold none; a path or an address that a user wrote may.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

REDACTED = "[redacted]"
_SECRET_WORDS = frozenset(
    {"token", "secret", "secrets", "password", "passwd", "passphrase", "pwd", "credential", "credentials", "auth"}
    | {"authorization", "bearer", "cookie", "apikey", "accesskey"}
)
_SECRET_PAIRS = frozenset({("api", "key"), ("access", "key"), ("private", "key"), ("secret", "key")})
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SECRET_TEXT = re.compile(
    r"""(?x)
    (?<=://)[^\s/@]+@                                                   # user:password@ in an address
    | (?<=[?&;\s])(?i:token|key|api_key|secret|password|signature|sig|access_token)=[^&\s]+
    | \b(?:hf_|sk-|ghp_|gho_|ghs_|ghu_|github_pat_|glpat-|xox[abprs]-|npm_|pypi-)[A-Za-z0-9_-]{10,}
    | \b(?:AKIA|ASIA)[A-Z0-9]{16}\b
    | \bAIza[A-Za-z0-9_-]{30,}
    | \beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*           # a JSON web token
    """
)


def redact(value: Any, *, key: str = "") -> Any:
    """The same JSON value with REDACTED for each secret in it, at any depth. `tokenizer` and `tokens` are none."""
    if isinstance(value, dict):
        return {name: redact(item, key=str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, key=key) for item in value]
    if value is None or isinstance(value, bool) or not _names_a_secret(key):
        return _SECRET_TEXT.sub(REDACTED, value) if isinstance(value, str) else value
    return REDACTED


def _names_a_secret(key: str) -> bool:
    words = [word.lower() for word in _WORD.findall(key)]
    return not _SECRET_WORDS.isdisjoint(words) or any(pair in _SECRET_PAIRS for pair in itertools.pairwise(words))

# SPDX-License-Identifier: Apache-2.0
"""`lora-megatron inspect`: a table, or one JSON object, of what a folder is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_megatron.commands.describe import Facts, compact_ranks, describe
from lora_megatron.errors import CheckpointError
from lora_megatron.measure.console import print_table
from lora_megatron.measure.units import show_bytes, show_count

_MOST_FILES = 8


def run_inspect(path: Path, *, as_json: bool) -> None:
    """Print what the folder `path` is, on stdout.

    Raises:
        CheckpointError: see `describe`.
    """
    facts = describe(path)
    if not as_json:
        print_table(f"{facts['kind']}: {facts['path']}", ("field", "value"), [*_rows(facts)])
        return
    try:
        print(json.dumps(facts, indent=2, allow_nan=False))
    except ValueError:  # JSON can write 1e999, which is read as infinity
        raise CheckpointError(f"{path} holds a number too large to be one") from None


def _rows(facts: Facts) -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        if key in ("kind", "path", "rank_stabilised") or value in (None, {}, []):
            continue
        words = key.replace("_", " ")
        if key in ("shape", "identity"):
            yield from ((f"{words}: {name}", _text(name, part)) for name, part in value.items() if name not in facts)
        elif key == "files":
            yield from _file_rows(value)
        elif key == "alpha":
            yield "alpha", f"{value:g}"
            yield "scaling", "alpha / sqrt(rank)" if facts.get("rank_stabilised") else "alpha / rank"
        elif key == "parts":
            yield from (("part", part) for part in value)
        else:
            yield words, _text(key, value)


def _text(key: str, value: Any) -> str:
    if key == "ranks":
        return compact_ranks(value)
    if key == "bytes":
        return f"{show_bytes(value)} ({show_count(value)})"
    if key == "parameters":
        return show_count(value)
    if key == "dtypes" and len(value) == 1:
        return str(next(iter(value)))
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(name, part)}" for name, part in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _file_rows(files: dict[str, int]) -> Iterator[tuple[str, str]]:
    shown = list(files.items())[:_MOST_FILES]
    yield from ((f"file: {name}", show_bytes(size)) for name, size in shown)
    if len(files) > len(shown):
        yield "files in all", show_count(len(files))

# SPDX-License-Identifier: Apache-2.0
"""What is evaluated: rows of a prepared file, each an instance with all its accepted texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_megatron.data.examples import prompt_ids
from lora_megatron.data.parquet import ExampleTable
from lora_megatron.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Instance:
    """A context and what may be said of it."""

    id: str
    context: str
    references: tuple[str, ...]
    meta: str | None = None
    """What scorers know besides: JSON of the file's `meta` column."""
    rendered: bool = False
    """By a chat template: special tokens that context and references spell are special tokens."""

    def spoken_references(self, tokenizer: Tokenizer) -> list[str]:
        """The references as a prediction is written: without special tokens."""
        if not self.rendered:
            return list(self.references)
        return [tokenizer.decode(tokenizer.encode_rendered(text)) for text in self.references]


@dataclass(frozen=True)
class Prompt:
    """A context as the model reads it, in training and here alike."""

    id: str
    ids: list[int]


def instances_of(table: ExampleTable, *, group: bool, limit: int | None = None) -> list[Instance]:
    """The instances of a file, in its order; the first `limit` of them.

    group: rows that have the same context and the same several references are one instance, that of the first: E2E,
    WebNLG and DART have a row for each reference, and their scorers count each context once.
    """
    found: dict[object, Instance] = {}
    for row, (row_id, context, _) in enumerate(table):
        references = tuple(table.references(row))
        meta = table.meta(row)
        key = (context, references, meta) if group and len(references) > 1 else row
        if key not in found:
            if limit is not None and len(found) == limit:
                break
            found[key] = Instance(row_id, context, references, meta, table.rendered)
    return list(found.values())


def prompts_of(rows: Sequence[Instance], tokenizer: Tokenizer) -> list[Prompt]:
    """Their contexts, in order."""
    return [Prompt(row.id, prompt_ids(row.context, tokenizer, rendered=row.rendered)) for row in rows]

# SPDX-License-Identifier: Apache-2.0
"""How long the rows of a split are: tokens and truncations with a tokenizer, bytes without."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora_megatron.data.examples import prompt_ids, target_ids, trim_example
from lora_megatron.data.tokenizer import Tokenizer


@dataclass
class Total:
    """Of one split: its bytes of text, or its tokens and how many rows lose some of them."""

    bytes: int = 0
    tokens: int = 0
    truncated: int = 0


@dataclass
class Lengths:
    """Adds up what training would see: the prompt, the target and the end token.

    sequence_length: of training rows; a row that is longer counts as truncated. rendered: by a chat template.
    """

    tokenizer: Tokenizer | None = None
    sequence_length: int | None = None
    rendered: bool = False
    totals: dict[str, Total] = field(default_factory=dict)

    def add(self, split: str, context: str, target: str) -> None:
        """Count one row."""
        total = self.totals.setdefault(split, Total())
        if self.tokenizer is None:
            total.bytes += len(context.encode("utf-8")) + len(target.encode("utf-8"))
            return
        prompt = prompt_ids(context, self.tokenizer, rendered=self.rendered)
        answer = target_ids(target, self.tokenizer, rendered=self.rendered)
        total.tokens += len(prompt) + len(answer)
        if self.sequence_length is not None:
            total.truncated += trim_example(prompt, answer, self.sequence_length).truncated

    def describe(self, split: str) -> str:
        """`12,345 tokens, 6 rows truncated at 512`, or `12,345 bytes`."""
        total = self.totals.get(split, Total())
        if self.tokenizer is None:
            return f"{total.bytes:,} bytes"
        cut = f", {total.truncated:,} rows truncated at {self.sequence_length}" if self.sequence_length else ""
        return f"{total.tokens:,} tokens{cut}"

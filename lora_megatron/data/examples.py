# SPDX-License-Identifier: Apache-2.0
"""One example as a training row: which tokens, which labels, and where the loss counts; several examples per row.

ids     c0 c1 .. "\\n" | t0 t1 .. eos      context and a line end, then the target
tokens  ids[:-1], labels ids[1:]           position j predicts ids[j + 1]
loss    where labels[j] is a target token  (loss="target"), or everywhere but on padding (loss="all")

A text that a chat template has rendered brings its own line ends and special tokens: no "\\n" is put between, and what
reads like a special token of the tokenizer is one. Everywhere else text stays text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lora_megatron.data.tokenizer import Tokenizer
from lora_megatron.errors import ConfigError

Loss = Literal["target", "all"]
LOSSES = ("target", "all")


@dataclass(frozen=True)
class TrimmedExample:
    """An example that fits a row: at most sequence_length + 1 ids."""

    ids: list[int]
    target_start: int
    """Index in `ids` of the first target token; every target token from here on is predicted by the one before."""
    truncated: bool


@dataclass(frozen=True)
class EncodedExample:
    """One padded row; every array has the shape [sequence_length]."""

    tokens: np.ndarray
    """int64, padded on the right with the tokenizer's pad id."""
    labels: np.ndarray
    """int64, the token that follows; the pad id where there is none."""
    loss_mask: np.ndarray
    """float32, 1 where the label counts."""
    truncated: bool


def prompt_ids(context: str, tokenizer: Tokenizer, *, rendered: bool = False) -> list[int]:
    """The ids that precede a target, in training and in generation alike; rendered: by a chat template."""
    return tokenizer.encode_rendered(context) if rendered else tokenizer.encode(context + "\n")


def target_ids(target: str, tokenizer: Tokenizer, *, rendered: bool = False) -> list[int]:
    """The ids that are learned: the target's and the end token."""
    return [*(tokenizer.encode_rendered(target) if rendered else tokenizer.encode(target)), tokenizer.eos_id]


def trim_example(context: list[int], target: list[int], sequence_length: int) -> TrimmedExample:
    """Join context and target ids into at most sequence_length + 1 ids.

    The target is what is learned, so the context loses tokens from its left first. Its last token stays even when
    the target fills the row: without it nothing would predict the first target token. A target that is still too
    long loses its end.
    """
    kept_target = target[:sequence_length]
    room = sequence_length + 1 - len(kept_target)
    kept_context = context[-room:]
    truncated = len(kept_target) < len(target) or len(kept_context) < len(context)
    return TrimmedExample(kept_context + kept_target, len(kept_context), truncated)


def tokenise_example(
    context: str, target: str, tokenizer: Tokenizer, sequence_length: int, *, rendered: bool = False
) -> TrimmedExample:
    """Ids of prompt, target and eos, trimmed to fit a row of sequence_length."""
    prompt, answer = prompt_ids(context, tokenizer, rendered=rendered), target_ids(target, tokenizer, rendered=rendered)
    return trim_example(prompt, answer, sequence_length)


def loss_positions(length: int, target_start: int, loss: Loss) -> slice:
    """The positions of an example's labels that count, for an example of `length` ids (so length - 1 labels)."""
    return slice(max(target_start - 1, 0) if loss == "target" else 0, length - 1)


def encode_example(
    context: str, target: str, tokenizer: Tokenizer, sequence_length: int, loss: Loss = "target"
) -> EncodedExample:
    """One example as a right-padded row.

    Raises ConfigError for a sequence_length below 1 or an unknown `loss`.
    """
    check_row_options(sequence_length, loss)
    example = tokenise_example(context, target, tokenizer, sequence_length)
    used = len(example.ids) - 1
    tokens = np.full(sequence_length, tokenizer.pad_id, dtype=np.int64)
    labels = np.full(sequence_length, tokenizer.pad_id, dtype=np.int64)
    loss_mask = np.zeros(sequence_length, dtype=np.float32)
    tokens[:used] = example.ids[:-1]
    labels[:used] = example.ids[1:]
    loss_mask[loss_positions(len(example.ids), example.target_start, loss)] = 1.0
    return EncodedExample(tokens, labels, loss_mask, example.truncated)


def check_row_options(sequence_length: int, loss: str) -> None:
    """Raise ConfigError for a sequence_length below 1 or an unknown `loss`."""
    if sequence_length < 1:
        raise ConfigError(f"sequence_length {sequence_length} must be 1 or more")
    if loss not in LOSSES:
        raise ConfigError(f"loss {loss!r} is unknown; use one of {', '.join(LOSSES)}")


def pack(lengths: Sequence[int], sequence_length: int) -> list[range]:
    """Group consecutive examples into rows: each row takes examples, in order, as long as they fit.

    lengths: positions each example occupies (its ids less one), each at most sequence_length.
    Returns the example indices of every row. Order is kept, so a packed epoch holds every example exactly once and
    neighbours stay neighbours.
    """
    rows: list[range] = []
    start = used = 0
    for index, length in enumerate(lengths):
        if used + length > sequence_length and index > start:
            rows.append(range(start, index))
            start, used = index, 0
        used += length
    if len(lengths) > start:
        rows.append(range(start, len(lengths)))
    return rows

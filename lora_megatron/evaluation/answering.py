# SPDX-License-Identifier: Apache-2.0
"""From prompts to answers in plain values: a text that goes on, or the likeliest of some labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from lora_megatron.data.examples import target_ids
from lora_megatron.data.tokenizer import Tokenizer
from lora_megatron.errors import ConfigError, DataError
from lora_megatron.evaluation.decoder import Decoder
from lora_megatron.evaluation.generate import generate
from lora_megatron.evaluation.labels import label_scores
from lora_megatron.evaluation.rows import Prompt
from lora_megatron.evaluation.settings import SEQUENCES_AT_ONCE, Decoding

Answer = dict[str, Any]
"""`prediction` and what else there is to say about it; plain values, as they are written as JSON."""


class Answering(Protocol):
    """What is done with a batch of prompts."""

    def fit(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts as the model can take them. Raises DataError for one that is too long."""

    def answer(self, decoder: Decoder, prompts: Sequence[Prompt]) -> list[Answer]:
        """An answer to each; collective over the ranks of one model."""

    def batch_size(self) -> int:
        """Prompts at a time where the user says nothing."""


@dataclass(frozen=True)
class Continuing:
    """Go on as `settings` say until the end token; positions: those of the model.

    Raises:
        ConfigError: more beams than the vocabulary can tell apart.
    """

    settings: Decoding
    tokenizer: Tokenizer
    positions: int
    cut: bool = False
    """Drop the beginning of prompts that leave too little room, as training does, instead of refusing them."""

    def __post_init__(self) -> None:
        if 2 * self.settings.beams > self.tokenizer.vocab_size and self.settings.kind == "beams":
            size = self.tokenizer.vocab_size
            raise self.settings.error_of("beams", f"cannot be: a vocabulary of {size} has at most {size // 2}")

    def fit(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """See `Answering`. A prompt that fills all positions still has one new token."""
        kept = max(self.positions + 1 - self.settings.max_new_tokens, self.positions // 2, 1)
        return [_fitted(p, most=self.positions, kept=kept, positions=self.positions, cut=self.cut) for p in prompts]

    def answer(self, decoder: Decoder, prompts: Sequence[Prompt]) -> list[Answer]:
        """See `Answering`."""
        done = generate(
            decoder,
            [prompt.ids for prompt in prompts],
            self.settings,
            limits=[self.positions + 1 - len(prompt.ids) for prompt in prompts],
            eos_id=self.tokenizer.eos_id,
            row_ids=[prompt.id for prompt in prompts],
            vocab_size=self.tokenizer.vocab_size,
        )
        return [
            {
                "prediction": self.tokenizer.decode(one.tokens),
                "tokens": len(one.tokens),
                "ended": one.ended,
                **({} if one.score is None else {"score": one.score}),
            }
            for one in done
        ]

    def batch_size(self) -> int:
        """See `Answering`."""
        return self.settings.batch_size()


@dataclass(frozen=True)
class Choosing:
    """Take the likeliest of `labels`; see `labels.label_scores`."""

    labels: tuple[str, ...]
    tokenizer: Tokenizer
    positions: int
    cut: bool = False

    def fit(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """See `Answering`. The end token is predicted, and takes no position."""
        most = self.positions + 1 - max(map(len, self._tokens()))
        if most < 1:
            raise ConfigError(f"a model of {self.positions} positions has no room for the labels {self.labels}")
        return [_fitted(p, most=most, kept=most, positions=self.positions, cut=self.cut) for p in prompts]

    def answer(self, decoder: Decoder, prompts: Sequence[Prompt]) -> list[Answer]:
        """See `Answering`. Of equally likely labels the first."""
        scores = label_scores(decoder, [prompt.ids for prompt in prompts], self._tokens())
        return [
            {
                "prediction": self.labels[row.index(max(row))],
                "log_likelihoods": dict(zip(self.labels, row, strict=True)),
            }
            for row in scores
        ]

    def batch_size(self) -> int:
        """See `Answering`."""
        return max(1, SEQUENCES_AT_ONCE // len(self.labels))

    def _tokens(self) -> list[list[int]]:
        return [target_ids(label, self.tokenizer) for label in self.labels]


def _fitted(prompt: Prompt, *, most: int, kept: int, positions: int, cut: bool) -> Prompt:
    """most: tokens that leave room for an answer; kept: what is left of a prompt that is cut."""
    if cut:
        return replace(prompt, ids=prompt.ids[-kept:])
    if len(prompt.ids) > most:
        raise DataError(
            f"row {prompt.id} has a prompt of {len(prompt.ids)} tokens, and beside an answer {most} of the model's "
            f"{positions} positions are left: shorten it, or give --cut-prompts to drop its beginning"
        )
    return prompt

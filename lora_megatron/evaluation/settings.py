# SPDX-License-Identifier: Apache-2.0
"""How a continuation is chosen: greedily, by sampling, or by beam search, in transformers' terms."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lora_megatron.errors import ConfigError

SEQUENCES_AT_ONCE = 64
"""Prompts times beams that a rank decodes together where no batch size is given: this bounds the key/value cache."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Raises ConfigError for values that cannot work."""

    max_new_tokens: int = 128
    beams: int = 1
    length_penalty: float = 1.0
    """A finished beam counts as log probability / tokens ** length_penalty."""
    early_stopping: bool = False
    """End as soon as there are as many finished beams as beams, instead of when none can improve on them."""
    no_repeat_ngram: int = 0
    """No sequence of so many tokens occurs twice; 0 allows all."""
    no_repeat_prompt: bool = True
    """Sequences of the prompt count as well, as in transformers; off: those of the continuation alone."""
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    """Sample among so many of the likeliest tokens; 0 is all."""
    top_p: float = 1.0
    """Sample among the fewest of the likeliest tokens that have this probability together."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fine, what in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("beams", 1 <= self.beams <= 1000, "1 to 1000"),
            ("length_penalty", abs(self.length_penalty) <= 100, "a number from -100 to 100"),
            ("no_repeat_ngram", self.no_repeat_ngram >= 0, "0 or more"),
            ("temperature", 0 < self.temperature < math.inf, "above 0"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not fine:
                raise self.error_of(name, f"cannot be: give {what}")
        if self.sample and self.beams > 1:
            raise ConfigError(f"--sample and --beams {self.beams}: choose one of them")

    def error_of(self, name: str, problem: str) -> ConfigError:
        """`--flag value` and what is wrong with it."""
        return ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} {problem}")

    @property
    def kind(self) -> Literal["beams", "sampling", "greedy"]:
        """Which of the three it is."""
        return "beams" if self.beams > 1 else "sampling" if self.sample else "greedy"

    def batch_size(self) -> int:
        """Prompts at a time where the user says nothing."""
        return max(1, SEQUENCES_AT_ONCE // self.beams)

    def to_dict(self) -> dict[str, Any]:
        """What decides about the result, in plain values: nothing of a kind that does not run."""
        mine = {
            "beams": ("beams", "length_penalty", "early_stopping"),
            "sampling": ("temperature", "top_k", "top_p", "seed"),
            "greedy": (),
        }[self.kind]
        common = ("max_new_tokens", "no_repeat_ngram", "no_repeat_prompt")
        return {"decoding": self.kind, **{k: v for k, v in asdict(self).items() if k in (*common, *mine)}}


@dataclass(frozen=True)
class Generated:
    """One continuation."""

    tokens: list[int]
    """Without the end token."""
    ended: bool
    """By the end token, and not because there was no more room."""
    score: float | None = None
    """Of a beam: log probability / tokens ** length_penalty."""

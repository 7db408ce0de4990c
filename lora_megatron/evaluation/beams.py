# SPDX-License-Identifier: Apache-2.0
"""Beam search over one prompt in numbers alone: no model, no tensors of one; the semantics of transformers' `generate`.

At every step the 2 K likeliest continuations of the K running beams come in, best first. Those that end count if they
are among the first K; K of the others run on. A finished beam's score is log probability / tokens ** length_penalty,
and the K best finished are kept. The search is over when K are finished and none that runs can, at its present length,
beat the worst of them (with early stopping: as soon as K are finished), or when there is no room for another token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Candidate(NamedTuple):
    """A running beam with one more token: its log probability, that beam's index, the token."""

    total: float
    beam: int
    token: int


class Finished(NamedTuple):
    """A beam that goes no further; `tokens` are without the end token."""

    score: float
    tokens: list[int]
    ended: bool


class BeamSearch:
    """The beams of one prompt. Before the first step all of them are the prompt, and count as one."""

    def __init__(self, *, beams: int, length_penalty: float, early_stopping: bool, eos_id: int, limit: int) -> None:
        self._count, self._penalty, self._early = beams, length_penalty, early_stopping
        self._eos_id, self._limit = eos_id, limit
        self.totals = [0.0]
        """Log probabilities of the running beams, best first; fp32 values."""
        self._running: list[list[int]] = [[]]
        self._finished: list[Finished] = []
        self.done = False

    def advance(self, candidates: Sequence[Candidate]) -> tuple[list[int], list[int]]:
        """Take 2 K candidates, best first; (which beam each of the K new ones continues, its new token)."""
        length = len(self._running[0]) + 1
        at_limit = length == self._limit
        full = len(self._finished) == self._count
        for candidate in candidates[: self._count]:
            if candidate.token == self._eos_id or at_limit:
                self._finish(candidate, length)
        assert not (full and self._early), "an ended search takes no more"
        going = [c for c in candidates if c.token != self._eos_id][: self._count]
        self.totals = [c.total for c in going]
        self._running = [[*self._running[c.beam], c.token] for c in going]
        self.done = at_limit or not self._can_improve(length)
        return [c.beam for c in going], [c.token for c in going]

    def best(self) -> Finished:
        """The best finished beam of a search that is done."""
        return self._finished[0]

    def _finish(self, candidate: Candidate, length: int) -> None:
        ended = candidate.token == self._eos_id
        tokens = self._running[candidate.beam] + ([] if ended else [candidate.token])
        self._finished.append(Finished(self._score(candidate.total, length), tokens, ended))
        self._finished.sort(key=lambda finished: -finished.score)  # stable: the older one wins a tie
        del self._finished[self._count :]

    def _can_improve(self, length: int) -> bool:
        if len(self._finished) < self._count:
            return True
        return not self._early and self._score(self.totals[0], length) > self._finished[-1].score

    def _score(self, total: float, length: int) -> float:
        return float(np.float32(total) / np.float32(length**self._penalty))

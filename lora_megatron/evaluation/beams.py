# SPDX-License-Identifier: Apache-2.0
"""Beam search over a batch of prompts in numbers alone: no model, no device; the semantics of transformers' `generate`.

At every step the 2 K likeliest continuations of the K running beams of each prompt come in, best first. Those that end
count if they are among the first K; K of the others run on. A finished beam's score is log probability / tokens **
length_penalty, and the K best finished are kept. A search is over when K are finished and none that runs can, at its
present length, beat the worst of them (with early stopping: as soon as K are finished), or when there is no room for
another token.

What runs is kept in arrays, so that a step costs a few operations however many prompts there are:

    totals [p, k]       log probabilities of the running beams, best first      p: prompts whose search is not over
    texts [p, k, n]     what they have said so far                              k: 1 before the first step, then K
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Finished(NamedTuple):
    """A beam that goes no further; `tokens` are without the end token."""

    score: float
    tokens: list[int]
    ended: bool


class BeamSearches:
    """The beams of prompts that start together. Before the first step a prompt's beams count as one, of no tokens.

    limits: most tokens of each prompt's continuation, 1 or more.
    """

    def __init__(
        self, limits: Sequence[int], *, beams: int, length_penalty: float, early_stopping: bool, eos_id: int
    ) -> None:
        self._count, self._penalty, self._early, self._eos_id = beams, length_penalty, early_stopping, eos_id
        self._limits, self._length = np.array(limits), 0
        self._finished: list[list[Finished]] = [[] for _ in limits]
        self.going = np.arange(len(limits))
        """[p] which prompts these are."""
        self.totals: NDArray[np.float32] = np.zeros((len(limits), 1), np.float32)
        self.texts: NDArray[np.int64] = np.zeros((len(limits), 1, 0), np.int64)

    def advance(self, candidates: NDArray[np.float64]) -> tuple[list[int], list[int]]:
        """Take [p, 2 K, 3] of (log probability, beam, token), best first, with one more token each.

        Returns, for the K beams of each prompt whose search goes on: which of the p * k sequences before it continues,
        and its new token.
        """
        totals, (beams, tokens) = candidates[..., 0], candidates[..., 1:].astype(np.int64).transpose(2, 0, 1)
        self._length += 1
        at_limit, ends = self._limits[self.going] == self._length, tokens == self._eos_id
        first = slice(None, self._count)
        self._finish(totals[:, first], beams[:, first], tokens[:, first], (ends | at_limit[:, None])[:, first])
        onward = np.argsort(ends, axis=1, kind="stable")[:, first]  # those that do not end, still best first
        totals, beams, tokens = (np.take_along_axis(x, onward, 1) for x in (totals, beams, tokens))
        places = np.flatnonzero(~at_limit & self._can_improve(totals[:, 0]))
        totals, beams, tokens = totals[places], beams[places], tokens[places]
        rows = places[:, None] * self.texts.shape[1] + beams
        self.texts = np.concatenate([self.texts[places[:, None], beams], tokens[..., None]], -1)
        self.totals, self.going = totals.astype(np.float32), self.going[places]
        return rows.ravel().tolist(), tokens.ravel().tolist()

    def best(self) -> list[Finished]:
        """Of each prompt the best finished beam; all searches are over."""
        assert not len(self.going)
        return [finished[0] for finished in self._finished]

    def _finish(
        self,
        totals: NDArray[np.float64],
        beams: NDArray[np.int64],
        tokens: NDArray[np.int64],
        new: NDArray[np.bool_],
    ) -> None:
        """Of candidates [p, K] those that are `new` among the finished."""
        for place, rank in zip(*np.nonzero(new), strict=True):  # few: a beam ends once
            finished, token = self._finished[self.going[place]], int(tokens[place, rank])
            ended = token == self._eos_id
            text = [*self.texts[place, beams[place, rank]].tolist(), *([] if ended else [token])]
            finished.append(Finished(float(self._scores(totals[place, rank])), text, ended))
            finished.sort(key=lambda one: -one.score)  # stable: the older one wins a tie
            del finished[self._count :]

    def _can_improve(self, best: NDArray[np.float64]) -> NDArray[np.bool_]:
        """[p] whether beams of which the best has this total may still change what is finished."""
        finished = [self._finished[prompt] for prompt in self.going]
        full = np.array([len(one) == self._count for one in finished], dtype=bool)
        if self._early:
            return ~full
        worst = np.array([one[-1].score if one else -np.inf for one in finished])
        return ~full | (self._scores(best).astype(np.float64) > worst)

    def _scores(self, totals: NDArray[np.float64] | np.float64) -> NDArray[np.float32]:
        return np.asarray(totals, np.float32) / np.float32(self._length**self._penalty)

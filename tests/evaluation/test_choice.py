# SPDX-License-Identifier: Apache-2.0
"""Truncation, bans and beams in numbers, against transformers' processors and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lora_megatron.errors import ConfigError
from lora_megatron.evaluation.beams import BeamSearches
from lora_megatron.evaluation.choice import ban_repeats, padded, sample, truncate, uniform
from lora_megatron.evaluation.settings import Decoding


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.7), (12, 0.6), (99, 0.01)])
def test_truncation_is_that_of_transformers(top_k: int, top_p: float) -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(2)) * 2
    wanted = TemperatureLogitsWarper(0.7)(None, logits)
    wanted = TopKLogitsWarper(top_k)(None, wanted) if top_k else wanted
    wanted = TopPLogitsWarper(top_p)(None, wanted) if top_p < 1 else wanted
    settings = Decoding(sample=True, temperature=0.7, top_k=top_k, top_p=top_p)
    assert torch.equal(truncate(logits, settings), wanted)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_bans_are_those_of_transformers_whatever_stands_beside_a_row(size: int) -> None:
    rows = torch.randint(0, 3, (5, 12), generator=torch.Generator().manual_seed(3)).tolist()
    rows = [row[: 12 - 2 * i] for i, row in enumerate(rows)] + [[]]
    scores = torch.randn(6, 5)
    banned = ban_repeats(scores, torch.from_numpy(padded(rows)), size)
    for row, text in enumerate(rows):
        alone = scores[row : row + 1]
        want = NoRepeatNGramLogitsProcessor(size)(torch.tensor([text]), alone) if text else alone
        assert torch.equal(banned[row : row + 1], want)
    assert banned.isinf().any()


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([[1.0, -torch.inf, 0.0, 2.0]])
    count = 20_000
    numbers = [uniform(4, f"row {row}", 0) for row in range(count)]
    drawn = sample(logits.expand(count, -1), Decoding(sample=True), numbers)
    shares = torch.bincount(drawn, minlength=4) / count
    assert shares[1] == 0
    torch.testing.assert_close(shares, logits[0].softmax(-1), rtol=0, atol=0.015)  # four standard deviations


def searches(*limits: int, penalty: float = 1.0, early: bool = False) -> BeamSearches:
    """Two beams, end token 0."""
    return BeamSearches(limits, beams=2, length_penalty=penalty, early_stopping=early, eos_id=0)


def step(search: BeamSearches, *rows: list[tuple[float, int, int]]) -> tuple[list[int], list[int]]:
    """Of each prompt (log probability, beam, token) of its four best continuations."""
    return search.advance(np.array(rows, np.float64))


ENDS_FIRST = [(-1.0, 0, 0), (-1.2, 0, 5), (-4.0, 0, 6), (-5.0, 0, 7)]
ENDS_LATER = [(-1.5, 0, 0), (-6.0, 0, 4), (-7.0, 1, 4), (-8.0, 1, 3)]
GOES_ON = [(-0.1, 0, 8), (-0.2, 0, 9), (-0.3, 0, 7), (-0.4, 0, 6)]
CROSSES = [(-0.2, 1, 3), (-0.3, 0, 4), (-0.4, 0, 5), (-0.5, 1, 6)]


def test_the_length_penalty_decides_between_short_and_long() -> None:
    """One ends with -1.0 after 1 token, the other with -1.5 after 2."""
    for penalty, winner in ((0.0, []), (1.0, [5])):
        search = searches(9, penalty=penalty)
        assert step(search, ENDS_FIRST) == ([0, 0], [5, 6])
        assert step(search, ENDS_LATER) == ([], [])
        assert search.best()[0].tokens == winner
        assert search.best()[0].ended


def test_early_stopping_ends_where_an_open_beam_could_still_win() -> None:
    """Finished with -3.0 and -3.6 per token, and one that runs with -3.5."""
    for early in (False, True):
        search = searches(9, early=early)
        step(search, [(-3.0, 0, 0), (-3.1, 0, 5), (-3.2, 0, 6), (-9.0, 0, 7)])
        rows, _ = step(search, [(-7.0, 0, 4), (-7.2, 1, 0), (-7.9, 1, 4), (-9.0, 1, 3)])
        assert (rows == []) == early


def test_a_search_that_is_over_leaves_the_others_their_places() -> None:
    """Of three prompts the middle one ends at the second step, where the third is at its limit: rows are counted among
    those before the step, two to a prompt, and texts stay with their prompt."""
    search = searches(9, 9, 2)
    assert step(search, GOES_ON, ENDS_FIRST, GOES_ON) == ([0, 0, 1, 1, 2, 2], [8, 9, 5, 6, 8, 9])
    assert search.going.tolist() == [0, 1, 2]
    assert step(search, CROSSES, ENDS_LATER, CROSSES) == ([1, 0], [3, 4])
    assert search.going.tolist() == [0]
    assert search.texts.tolist() == [[[9, 3], [8, 4]]]
    assert search.totals.tolist() == [[np.float32(-0.2), np.float32(-0.3)]]
    assert step(search, [(-0.3, 1, 0), (-0.4, 0, 0), (-9.0, 0, 2), (-9.1, 0, 1)]) == ([], [])
    best = search.best()
    assert [one.tokens for one in best] == [[8, 4], [5], [9, 3]]
    assert [one.ended for one in best] == [True, True, False]
    assert best[0].score == np.float32(-0.3) / np.float32(3)


def test_of_equally_good_beams_the_one_that_ended_first_wins() -> None:
    search = searches(9, penalty=0.0)
    step(search, [(-1.0, 0, 5), (-1.0, 0, 0), (-2.0, 0, 6), (-5.0, 0, 7)])
    step(search, [(-1.0, 0, 0), (-9.0, 0, 4), (-9.5, 1, 4), (-9.9, 1, 3)])
    assert search.best()[0].tokens == []


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"beams": 0}, "--beams 0 cannot be"),
        ({"top_p": 0.0}, "--top-p 0.0 cannot be"),
        ({"temperature": float("nan")}, "--temperature nan cannot be"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0 cannot be"),
        ({"sample": True, "beams": 3}, "--sample and --beams 3"),
    ],
)
def test_values_that_cannot_work_are_named(values: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Decoding(**values)  # type: ignore[arg-type]

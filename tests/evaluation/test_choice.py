# SPDX-License-Identifier: Apache-2.0
"""Truncation, bans and beams in numbers, against transformers' processors and by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lora_megatron.errors import ConfigError
from lora_megatron.evaluation.beams import BeamSearch, Candidate
from lora_megatron.evaluation.choice import ban_repeats, padded, sample, truncate, uniform
from lora_megatron.evaluation.settings import Decoding

CPU = torch.device("cpu")


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
    banned = ban_repeats(scores, padded(rows, CPU), size)
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


def test_the_length_penalty_decides_between_short_and_long() -> None:
    """2 beams, end token 0: one ends with -1.0 after 1 token, the other with -1.5 after 2."""
    for penalty, winner in ((0.0, []), (1.0, [5])):
        search = BeamSearch(beams=2, length_penalty=penalty, early_stopping=False, eos_id=0, limit=9)
        search.advance([Candidate(-1.0, 0, 0), Candidate(-1.2, 0, 5), Candidate(-4.0, 0, 6), Candidate(-5.0, 0, 7)])
        assert not search.done
        steps = search.advance(
            [Candidate(-1.5, 0, 0), Candidate(-6.0, 0, 4), Candidate(-7.0, 1, 4), Candidate(-8.0, 1, 3)]
        )
        assert steps == ([0, 1], [4, 4])
        assert search.done
        assert search.best().tokens == winner


def test_early_stopping_ends_where_an_open_beam_could_still_win() -> None:
    """Finished with -3.0 and -3.6 per token, and one that runs with -3.5."""
    for early in (False, True):
        search = BeamSearch(beams=2, length_penalty=1.0, early_stopping=early, eos_id=0, limit=9)
        search.advance([Candidate(-3.0, 0, 0), Candidate(-3.1, 0, 5), Candidate(-3.2, 0, 6), Candidate(-9.0, 0, 7)])
        search.advance([Candidate(-7.0, 0, 4), Candidate(-7.2, 1, 0), Candidate(-7.9, 1, 4), Candidate(-9.0, 1, 3)])
        assert search.done == early


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

# SPDX-License-Identifier: Apache-2.0
"""How far a prompt is continued: to the end token, the number of new tokens or the end of the row, each for itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_megatron.evaluation import greedy as module
from lora_megatron.parallel import groups  # on a CPU it answers for the CUDA calls of megatron-core

assert groups
END, PAD, WORD = 0, 1, 7


def continuations(monkeypatch: pytest.MonkeyPatch, lengths: list[int], **options: int) -> list[list[int]]:
    """What follows prompts of these lengths if every row says WORD, and END behind position 12 of row 0."""

    def next_tokens(chunks: Any, tokens: Tensor, last: Tensor, vocab_size: int) -> Tensor:
        assert int(last.max()) < tokens.shape[1]
        chosen = torch.full_like(last, WORD)
        if int(last[0]) == options.get("end_at", -1):
            chosen[0] = END
        return chosen

    monkeypatch.setattr(module, "_next_tokens", next_tokens)
    prompts = [[2] * length for length in lengths]
    room = {"length": 16, "new_tokens": options.get("new_tokens", 100)}
    return module.greedy([], prompts, eos_id=END, pad_id=PAD, vocab_size=8, **room)


def test_each_prompt_goes_on_to_the_end_of_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = continuations(monkeypatch, [3, 8, 15, 40])
    assert [len(answer) for answer in answers] == [13, 8, 8, 8]  # the longer ones keep the last half of a row
    assert all(set(answer) == {WORD} for answer in answers)


def test_a_number_of_new_tokens_leaves_room_for_longer_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [len(answer) for answer in continuations(monkeypatch, [3, 8, 12, 40], new_tokens=4)] == [4, 4, 4, 4]


def test_the_end_token_ends_a_row_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = continuations(monkeypatch, [3, 8], end_at=5)
    assert [len(answer) for answer in answers] == [3, 8]

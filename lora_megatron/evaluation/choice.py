# SPDX-License-Identifier: Apache-2.0
"""From logits to tokens: banned repetitions, truncated and sampled distributions, the likeliest continuations.

logits and scores are fp32 [b, vocabulary]; everything here works row by row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_megatron.evaluation.settings import Decoding


def padded(rows: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """[b, longest], the rows at its right, -1 in front of shorter ones."""
    found = np.full((len(rows), max(map(len, rows))), -1, np.int64)
    for place, row in enumerate(rows):
        found[place, found.shape[1] - len(row) :] = row
    return found


def ban_repeats(scores: Tensor, history: Tensor, size: int) -> Tensor:
    """-inf for every token that would end an n-gram of `size` tokens that `history` [b, t] (see `padded`) has.

    Nothing here waits for the device, so that the host is ahead of it until the tokens are chosen.
    """
    if size == 0 or history.shape[1] < size:
        return scores
    grams = history.unfold(1, size, 1)  # [b, t - size + 1, size]
    tail = history[:, history.shape[1] - size + 1 :]  # [b, size - 1]: with the next token the newest n-gram
    repeats = (grams[..., :-1] == tail[:, None]).all(-1) & (grams[..., 0] >= 0)  # padding stands in front
    most = torch.full_like(repeats, torch.inf, dtype=scores.dtype).masked_fill(repeats, -torch.inf)
    return scores.scatter_reduce(1, grams[..., -1].clamp(min=0), most, "amin")


def truncate(logits: Tensor, settings: Decoding) -> Tensor:
    """Logits at the temperature, -inf for what top-k and then top-p leave out; the likeliest token always stays."""
    scores = logits / settings.temperature
    if 0 < settings.top_k < scores.shape[-1]:
        least = scores.topk(settings.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if settings.top_p < 1:
        ordered, places = scores.sort(descending=False)
        below = ordered.softmax(-1).cumsum(-1) <= 1 - settings.top_p
        below[:, -1] = False
        scores = scores.masked_fill(torch.zeros_like(below).scatter(1, places, below), -torch.inf)
    return scores


def uniform(seed: int, row_id: str, step: int) -> float:
    """In [0, 1), a function of its arguments alone."""
    digest = hashlib.sha256(f"{seed}\0{step}\0{row_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 * (1 - 2**-53)


def sample(logits: Tensor, settings: Decoding, uniforms: Sequence[float]) -> Tensor:
    """[b] the token at which the cumulative distribution passes each row's number; none of probability 0."""
    cumulative = truncate(logits, settings).softmax(-1).double().cumsum(-1)
    numbers = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None]
    return torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True)[:, 0]


def likeliest(scores: Tensor, totals: Tensor, count: int) -> Tensor:
    """The `count` best continuations of each prompt's k beams, best first, as (total, beam, token): [p, count, 3].

    scores [p * k, vocabulary]: log probabilities of the next token; totals [p, k]: those of the beams.
    """
    prompts, beams = totals.shape
    vocabulary = scores.shape[-1]
    whole = (scores.view(prompts, beams, vocabulary) + totals[..., None]).flatten(1)
    best, places = whole.topk(count)
    return torch.stack([best.double(), (places // vocabulary).double(), (places % vocabulary).double()], -1)

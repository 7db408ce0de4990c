# SPDX-License-Identifier: Apache-2.0
"""Continuations of a batch of prompts; what a row becomes does not depend on the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lora_megatron.errors import ConfigError
from lora_megatron.evaluation.beams import BeamSearches
from lora_megatron.evaluation.choice import ban_repeats, likeliest, padded, sample, uniform
from lora_megatron.evaluation.decoder import Decoder, Pick
from lora_megatron.evaluation.settings import Decoding, Generated


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    settings: Decoding,
    *,
    limits: Sequence[int],
    eos_id: int,
    row_ids: Sequence[str] | None = None,
    vocab_size: int,
) -> list[Generated]:
    """One continuation of each prompt (none empty), in their order; collective over the ranks of one model.

    limits: most new tokens of each row, 1 or more, on top of `settings.max_new_tokens`. row_ids: with the seed, what a
    row's samples are a function of; needed for sampling. vocab_size: that of the decoder.

    Raises:
        ConfigError: more beams than the vocabulary can tell apart.
    """
    limits = [min(limit, settings.max_new_tokens) for limit in limits]
    if settings.kind != "beams":
        return _lines(decoder, prompts, settings, limits, eos_id, row_ids)
    if 2 * settings.beams > vocab_size:
        raise ConfigError(f"--beams {settings.beams}: a vocabulary of {vocab_size} has at most {vocab_size // 2}")
    return _beams(decoder, prompts, settings, limits, eos_id)


def _lines(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    settings: Decoding,
    limits: Sequence[int],
    eos_id: int,
    row_ids: Sequence[str] | None,
) -> list[Generated]:
    """Greedy or sampled: one line a row."""
    texts: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    alive = list(range(len(prompts)))

    def picking() -> Pick:
        said = [[*(prompts[row] if settings.no_repeat_prompt else ()), *texts[row]] for row in alive]
        seen = padded(said) if settings.no_repeat_ngram else None

        def pick(logits: Tensor) -> Tensor:
            scores = logits
            if seen is not None:
                scores = ban_repeats(logits, torch.from_numpy(seen).to(logits.device), settings.no_repeat_ngram)
            if not settings.sample:
                return scores.argmax(-1)
            assert row_ids is not None
            return sample(scores, settings, [uniform(settings.seed, row_ids[r], len(texts[r])) for r in alive])

        return pick

    chosen = decoder.start(prompts, picking(), (len(alive),))
    while True:
        going = []
        for place, (row, token) in enumerate(zip(alive, map(int, chosen.tolist()), strict=True)):
            if token == eos_id:
                ended[row] = True
                continue
            texts[row].append(token)
            if len(texts[row]) < limits[row]:
                going.append(place)
        if not going:
            return [Generated(text, end) for text, end in zip(texts, ended, strict=True)]
        decoder.select(going)
        alive = [alive[place] for place in going]
        chosen = decoder.advance([texts[row][-1] for row in alive], picking(), (len(alive),))


def _beams(
    decoder: Decoder, prompts: Sequence[Sequence[int]], settings: Decoding, limits: Sequence[int], eos_id: int
) -> list[Generated]:
    """The best of `settings.beams` beams a row; the decoder holds those of every unfinished row side by side."""
    searches = BeamSearches(
        limits,
        beams=settings.beams,
        length_penalty=settings.length_penalty,
        early_stopping=settings.early_stopping,
        eos_id=eos_id,
    )
    before = padded(prompts if settings.no_repeat_prompt else [[] for _ in prompts])
    count = 2 * settings.beams

    def picking() -> Pick:
        totals, texts = searches.totals, searches.texts
        said = before[searches.going].repeat(texts.shape[1], 0)  # [sequences, longest prompt]
        seen = np.concatenate([said, texts.reshape(len(said), -1)], 1)

        def pick(logits: Tensor) -> Tensor:
            scores = logits.log_softmax(-1)
            if settings.no_repeat_ngram:
                scores = ban_repeats(scores, torch.from_numpy(seen).to(logits.device), settings.no_repeat_ngram)
            return likeliest(scores, torch.from_numpy(totals).to(logits.device), count)

        return pick

    picked = decoder.start(prompts, picking(), (len(prompts), count, 3))
    while True:
        rows, tokens = searches.advance(picked.numpy())
        if not rows:
            return [Generated(best.tokens, best.ended, best.score) for best in searches.best()]
        decoder.select(rows)
        picked = decoder.advance(tokens, picking(), (len(searches.going), count, 3))

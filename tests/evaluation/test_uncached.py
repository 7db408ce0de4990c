# SPDX-License-Identifier: Apache-2.0
"""Decoding with keys and values kept says what decoding that runs every text anew says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_megatron.evaluation.decoder import Decoder, Pick, decoding
from lora_megatron.evaluation.generate import generate
from lora_megatron.evaluation.labels import label_scores
from lora_megatron.evaluation.live import open_model
from lora_megatron.evaluation.settings import Decoding, Generated
from lora_megatron.parallel.groups import Layout
from tests.huggingface.models import VOCABULARY, tokens
from tests.pool import Pool

NEW, LENGTHS = 10, (7, 1, 4)
PROMPTS = [row[:n].tolist() for row, n in zip(tokens(len(LENGTHS), max(LENGTHS), seed=8), LENGTHS, strict=True)]
LABELS = [[3, 5, 7], [4, 7], [7]]
SETTINGS = (
    Decoding(max_new_tokens=NEW, no_repeat_ngram=2),
    Decoding(max_new_tokens=NEW, beams=4, length_penalty=0.8, no_repeat_ngram=3, no_repeat_prompt=False),
    Decoding(max_new_tokens=NEW, sample=True, seed=3),
)
LAYOUTS = {"one": (1, Layout()), "tp2": (2, Layout(tensor=2)), "pp2": (2, Layout(pipeline=2))}
Said = tuple[list[list[Generated]], list[list[float]]]


class Anew:
    """A decoder that keeps the texts and nothing else."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._texts: list[list[int]] = []

    def start(self, prompts: Sequence[Sequence[int]], pick: Pick, shape: tuple[int, ...]) -> Tensor:
        self._texts = [list(prompt) for prompt in prompts]
        return self._decoder.start(self._texts, pick, shape)

    def advance(self, tokens: Sequence[int], pick: Pick, shape: tuple[int, ...]) -> Tensor:
        return self.start([[*text, token] for text, token in zip(self._texts, tokens, strict=True)], pick, shape)

    def select(self, rows: Sequence[int]) -> None:
        self._texts = [self._texts[row] for row in rows]


def say(decoder: Decoder) -> Said:
    ids = [str(row) for row in range(len(PROMPTS))]
    texts = [
        generate(decoder, PROMPTS, s, limits=[NEW] * len(ids), eos_id=7, row_ids=ids, vocab_size=VOCABULARY)
        for s in SETTINGS
    ]
    return texts, label_scores(decoder, PROMPTS, LABELS)


def both(base: Path, layout: Layout) -> tuple[Said, Said]:
    """On every rank: with the cache, and without."""
    model = open_model(base, layout=layout)
    with decoding(model.chunks, vocab_size=VOCABULARY) as decoder:
        return say(decoder), say(Anew(decoder))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_cached_and_uncached_decoding_agree(pool: Pool, saved: Callable[[str], Path], name: str, layout: str) -> None:
    world, cut = LAYOUTS[layout]
    for (texts, scores), (texts_anew, scores_anew) in pool.run(world, both, base=saved(name), layout=cut):
        for cached, anew in zip(texts, texts_anew, strict=True):
            assert [one.tokens for one in cached] == [one.tokens for one in anew]
            assert [one.ended for one in cached] == [one.ended for one in anew]
        torch.testing.assert_close(torch.tensor(scores), torch.tensor(scores_anew), rtol=0, atol=1e-4)

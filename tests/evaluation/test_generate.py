# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding and beam search equal transformers' `generate`, token for token, on every layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_megatron.evaluation.decoder import decoding
from lora_megatron.evaluation.generate import generate
from lora_megatron.evaluation.live import load_adapter, open_model, switch
from lora_megatron.evaluation.settings import Decoding, Generated
from lora_megatron.huggingface.merge import merge
from lora_megatron.parallel.groups import Layout
from tests.huggingface.adapters import make_adapter
from tests.huggingface.models import VOCABULARY, model_class, tokens
from tests.pool import Pool

END = {"gpt2": 76, "llama": 7}  # tokens that these models do choose, so that some texts end by themselves
LAYOUTS = {"one": (1, Layout()), "tp2": (2, Layout(tensor=2)), "pp2": (2, Layout(pipeline=2))}
NEW, LENGTHS = 14, (9, 1, 5, 6)
SETTINGS = (
    Decoding(max_new_tokens=NEW),
    Decoding(max_new_tokens=NEW, no_repeat_ngram=2),
    Decoding(max_new_tokens=NEW, beams=4, length_penalty=0.8, no_repeat_ngram=4),
    Decoding(max_new_tokens=NEW, beams=4, length_penalty=0.9, no_repeat_ngram=2, early_stopping=True),
    Decoding(max_new_tokens=NEW, beams=10, length_penalty=0.9, no_repeat_ngram=4),
    Decoding(max_new_tokens=NEW, beams=10, length_penalty=0.8, early_stopping=True),
    Decoding(max_new_tokens=NEW, beams=4, length_penalty=-1.0),
)
PROMPTS = [row[:n].tolist() for row, n in zip(tokens(len(LENGTHS), max(LENGTHS), seed=8), LENGTHS, strict=True)]


def ours(base: Path, adapter: Path, layout: Layout, eos: int) -> dict[str, list[list[Generated]]]:
    """On every rank, of the base and with the adapter: for each setting the continuations of one batch."""
    model = open_model(base, layout=layout)
    load_adapter(model, adapter, name="adapter")
    found: dict[str, list[list[Generated]]] = {}
    for name in (None, "adapter"):
        switch(model, name)
        with decoding(model.chunks, vocab_size=VOCABULARY) as decoder:
            found[name or "base"] = [
                generate(decoder, PROMPTS, s, limits=[NEW] * 4, eos_id=eos, vocab_size=VOCABULARY) for s in SETTINGS
            ]
    return found


def theirs(folder: Path, name: str) -> list[list[list[int]]]:
    """transformers, a prompt at a time: for each setting the tokens up to the end token."""
    model = model_class(name).from_pretrained(folder, dtype=torch.float32).eval()
    return [[_theirs(model, prompt, settings, END[name]) for prompt in PROMPTS] for settings in SETTINGS]


def _theirs(model: Any, prompt: list[int], settings: Decoding, eos: int) -> list[int]:
    beams = {"length_penalty": settings.length_penalty, "early_stopping": settings.early_stopping}
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        num_beams=settings.beams,
        no_repeat_ngram_size=settings.no_repeat_ngram,
        max_new_tokens=NEW,
        eos_token_id=eos,
        pad_token_id=eos,
        **(beams if settings.beams > 1 else {}),
    )[0, len(prompt) :].tolist()
    return out[: out.index(eos)] if eos in out else out


def prepare(base: Path, out: Path) -> None:
    make_adapter(base, out, targets={"q": 4, "v": 4, "fc1": 2})


@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_tokens_equal_transformers(pool: Pool, saved: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    base, adapter, merged = saved(name), tmp_path / "adapter", tmp_path / "merged"
    pool.run(1, prepare, base=base, out=adapter)
    merge(base, adapter, merged)
    wanted = {"base": theirs(base, name), "adapter": theirs(merged, name)}
    assert wanted["base"] != wanted["adapter"], "the adapter must say something"
    ended = [len(text) < NEW for texts in wanted["adapter"] + wanted["base"] for text in texts]
    assert any(ended), "some must end by themselves"
    assert not all(ended), "and some not"
    for world, layout in LAYOUTS.values():
        for rank in pool.run(world, ours, base=base, adapter=adapter, layout=layout, eos=END[name]):
            for kind, texts in wanted.items():
                for settings, found, want in zip(SETTINGS, rank[kind], texts, strict=True):
                    assert [g.tokens for g in found] == want, (kind, asdict(settings))


SAMPLING = Decoding(max_new_tokens=NEW, sample=True, temperature=1.3, top_k=30, top_p=0.9, seed=5)


def sampled(base: Path, layout: Layout) -> tuple[list[list[int]], list[list[int]]]:
    """On every rank: rows sampled in one batch, and one by one in another order."""
    model = open_model(base, layout=layout)
    ids = [f"row {row}" for row in range(len(PROMPTS))]

    def run(rows: list[int]) -> list[list[int]]:
        texts, names = [PROMPTS[row] for row in rows], [ids[row] for row in rows]
        limits = [NEW] * len(rows)
        done = generate(
            decoder, texts, SAMPLING, limits=limits, eos_id=END["llama"], row_ids=names, vocab_size=VOCABULARY
        )
        return [g.tokens for g in done]

    with decoding(model.chunks, vocab_size=VOCABULARY) as decoder:
        return run([0, 1, 2, 3]), [run([row])[0] for row in (3, 2, 1, 0)][::-1]


def test_samples_are_a_function_of_seed_and_row(pool: Pool, saved: Callable[[str], Path]) -> None:
    seen = [
        texts
        for world, layout in LAYOUTS.values()
        for rank in pool.run(world, sampled, base=saved("llama"), layout=layout)
        for texts in rank
    ]
    assert all(texts == seen[0] for texts in seen)
    assert len({tuple(text) for text in seen[0]}) == len(PROMPTS)

# SPDX-License-Identifier: Apache-2.0
"""Cached decoding on every layout equals transformers over whole sequences, row by row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_megatron.evaluation.decoder import decoding
from lora_megatron.huggingface.base import describe_hf_base
from lora_megatron.methods.lora import Lora
from lora_megatron.model.build import BuildOptions, build
from lora_megatron.parallel.groups import Layout, build_mesh
from tests.huggingface.models import VOCABULARY, model_class, tokens
from tests.pool import Pool

MODELS = ("gpt2", "llama", "mistral", "gpt_neox", "qwen3", "qwen2-yarn", "opt")
LAYOUTS = {
    "one": (1, Layout()),
    "tp2": (2, Layout(tensor=2)),
    "pp2": (2, Layout(pipeline=2)),
    "tp2-sp-vpp2": (4, Layout(tensor=2, pipeline=2, virtual_pipeline=2, sequence=True)),
}
LENGTHS, STEPS, LONGEST = (9, 1, 5), 4, 64


def logits_of(logits: Tensor) -> Tensor:
    return logits


def cached_logits(folders: list[Path], layout: Layout, texts: Tensor) -> list[Tensor]:
    """On every rank, for each model: logits [rows, 1 + STEPS, V] after each prompt and each token of its text."""
    build_mesh(layout, seed=1)
    found = []
    for folder in folders:
        base = describe_hf_base(folder)
        chunks = build(base.shape, Lora({}, 1.0), layout, BuildOptions())
        base.load(chunks)
        prompts = [text[:length].tolist() for text, length in zip(texts, LENGTHS, strict=True)]
        shape = (len(prompts), VOCABULARY)
        with decoding(chunks, vocab_size=VOCABULARY) as decoder:
            seen = [decoder.start(prompts, logits_of, shape)]
            for step in range(STEPS):
                new = [int(text[length + step]) for text, length in zip(texts, LENGTHS, strict=True)]
                seen.append(decoder.advance(new, logits_of, shape))
        assert all(chunk.training for chunk in chunks)
        found.append(torch.stack(seen, 1).float())
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cached_logits_equal_those_of_whole_sequences(pool: Pool, saved: Callable[[str], Path], layout: str) -> None:
    world, cut = LAYOUTS[layout]
    texts = tokens(batch=len(LENGTHS), length=max(LENGTHS) + STEPS)
    folders = [saved(name) for name in MODELS]
    for rank in pool.run(world, cached_logits, folders=folders, layout=cut, texts=texts):
        for name, found in zip(MODELS, rank, strict=True):
            model = model_class(name).from_pretrained(saved(name), dtype=torch.float32).eval()
            with torch.no_grad():
                whole = model(texts).logits
            for row, length in enumerate(LENGTHS):
                wanted = whole[row, length - 1 : length + STEPS]
                torch.testing.assert_close(found[row], wanted, rtol=0, atol=1e-4)


def last_positions(folder: Path, layout: Layout, text: Tensor) -> Tensor:
    """Logits after the last but one position a model has, and after its last."""
    build_mesh(layout, seed=1)
    base = describe_hf_base(folder)
    chunks = build(base.shape, Lora({}, 1.0), layout, BuildOptions())
    base.load(chunks)
    with decoding(chunks, vocab_size=VOCABULARY) as decoder:
        first = decoder.start([text[:-1].tolist()], logits_of, (1, VOCABULARY))
        return torch.cat([first, decoder.advance([int(text[-1])], logits_of, (1, VOCABULARY))]).float()


def test_a_text_may_fill_all_positions_also_where_sequence_shards_pad_it(
    pool: Pool, saved: Callable[[str], Path]
) -> None:
    text = tokens(batch=1, length=LONGEST)[0]
    layout = Layout(tensor=2, sequence=True)
    found = pool.run(2, last_positions, folder=saved("gpt2"), layout=layout, text=text)[1]
    model = model_class("gpt2").from_pretrained(saved("gpt2"), dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(found, model(text[None]).logits[0, -2:], rtol=0, atol=1e-4)

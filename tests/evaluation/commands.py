# SPDX-License-Identifier: Apache-2.0
"""Tiny models with a tokenizer, rows to evaluate, and the commands run on the ranks of the pool."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.distributed as dist
import yaml

from data_prep.writer import DatasetWriter
from lora_megatron.__main__ import main
from tests.huggingface.adapters import make_adapter
from tests.huggingface.models import make_model

POSITIONS, NEW = 64, 12
CONTEXTS = (
    "a: b",
    "name : Aromi | area : riverside",
    "q",
    "two words",
    "x | y | z",
    "the quick brown fox",
    "no",
    "end",
)
END = "<|endoftext|>"
_POSITIONS_OF = {"gpt2": "n_positions"}


def save_model(name: str, folder: Path) -> Path:
    """A tiny model of 257 byte tokens whose end token is one that it does choose, so that some texts end early."""
    import transformers

    model = make_model(name, vocab_size=257, **{_POSITIONS_OF.get(name, "max_position_embeddings"): POSITIONS})
    model.save_pretrained(folder)
    symbols = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), END]
    end = _end_of(model, [_byte_level(symbols).encode(context + "\n").ids for context in CONTEXTS])
    symbols[end], symbols[256] = symbols[256], symbols[end]
    backend = _byte_level(symbols)
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END).save_pretrained(folder)
    return folder


def _byte_level(symbols: Sequence[str]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def _end_of(model: Any, prompts: Sequence[list[int]]) -> int:
    """What the model says in most of its greedy continuations, though never at once; not in the prompts."""
    counts = torch.zeros(257)
    for ids in prompts:
        said = continued(model, ids, end=None)
        counts[list(set(said[2:]))] += 1
    for ids in prompts:
        counts[ids + continued(model, ids, end=None)[:2]] = 0
    return int(counts.argmax())


def continued(model: Any, prompt: Sequence[int], *, end: int | None, ban: int = 0, **settings: Any) -> list[int]:
    """What transformers' `generate` says after the prompt, up to the end token, at most NEW tokens.

    ban: no sequence of so many tokens twice in the continuation, whatever the prompt has.
    """
    from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor

    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return NoRepeatNGramLogitsProcessor(ban)(ids[:, len(prompt) :], scores)

    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=end,
        pad_token_id=0 if end is None else end,
        logits_processor=LogitsProcessorList([processor] if ban else []),
        **settings,
    )[0, len(prompt) :].tolist()
    return out[: out.index(end)] if end in out else out


def save_adapter(base: Path, out: Path) -> None:
    """Call it in a world."""
    make_adapter(base, out, targets={"q": 4, "v": 4, "fc1": 2})


def save_rows(folder: Path, rows: Sequence[tuple[str, list[str]]], *, rendered_for: str | None = None) -> Path:
    """test.parquet with these contexts and references; the first reference is the target."""
    writer = DatasetWriter(folder, preparer="test", options={}, rendered_for=rendered_for)
    with writer, writer.split("test") as split:
        for number, (context, references) in enumerate(rows):
            split.write(id=f"row-{number}", context=context, target=references[0], references=references)
    return folder / "test.parquet"


def save_config(path: Path, base: Path, **sections: dict[str, Any]) -> Path:
    """A training's configuration of that base."""
    path.write_text(yaml.safe_dump({"base": {"weights": str(base)}, **sections}), encoding="utf-8")
    return path


def run_each(commands: Sequence[Sequence[str]], store: str) -> list[int]:
    """The exit status of each command line, on this rank; each command ends its world, so each gets a new one."""
    rank, size = dist.get_rank(), dist.get_world_size()
    statuses = []
    for index, command in enumerate(commands):
        if not dist.is_initialized():
            dist.init_process_group("gloo", init_method=f"file://{store}-{index}", rank=rank, world_size=size)
        statuses.append(main(list(command)))
    return statuses


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

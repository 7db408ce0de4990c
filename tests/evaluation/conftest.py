# SPDX-License-Identifier: Apache-2.0
"""The tiny Hugging Face models of tests/huggingface, and models with a tokenizer and an adapter each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lora_megatron.huggingface.merge import merge
from tests.evaluation.commands import CONTEXTS, save_adapter, save_config, save_model, save_rows
from tests.huggingface.conftest import saved
from tests.pool import Pool

__all__ = ["saved"]


@dataclass(frozen=True)
class Reader:
    """A base with its tokenizer, an adapter, the same merged, a configuration, and rows."""

    base: Path
    adapter: Path
    merged: Path
    config: Path
    data: Path
    labelled: Path
    """The same contexts, each with a label of MNLI."""


@pytest.fixture(scope="session")
def reader(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reader]:
    """reader("gpt2"): read only."""
    root = tmp_path_factory.mktemp("readers")

    def make(name: str) -> Reader:
        folder = root / name
        parts = ("base", "adapter", "merged", "c.yaml", "data/test.parquet", "labelled/test.parquet")
        found = Reader(*(folder / part for part in parts))
        if not folder.exists():
            folder.mkdir()
            save_model(name, found.base)
            pool.run(1, save_adapter, base=found.base, out=found.adapter)
            merge(found.base, found.adapter, found.merged)
            save_config(found.config, found.base)
            save_rows(found.data.parent, [(context, [context[::-1], "another"]) for context in CONTEXTS])
            save_rows(found.labelled.parent, [(context, ["neutral"]) for context in CONTEXTS])
        return found

    return make

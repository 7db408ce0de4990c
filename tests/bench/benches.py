# SPDX-License-Identifier: Apache-2.0
"""Tiny benches for tests: a configuration without data files, and what a bench left behind."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lora_megatron.bench import gemm, report
from lora_megatron.commands.bench import run_bench
from lora_megatron.config import parse_config
from lora_megatron.errors import UserError
from tests.commands.runs import Outcome

Tree = dict[str, Any]
HIDDEN, LAYERS, VOCABULARY, LENGTH, BATCH = 32, 4, 100, 16, 4
PADDED = 128  # the vocabulary's rows in memory
LINEAR = 12 * HIDDEN**2  # weights of the linear layers of one layer


def make_tree(**sections: Tree) -> Tree:
    """Four layers of width 32 with adapters of rank 2 on q and 3 on v; `sections` win key by key."""
    tree: Tree = {
        "model": {
            "num_layers": LAYERS,
            "hidden_size": HIDDEN,
            "num_attention_heads": 4,
            "max_position_embeddings": LENGTH,
            "vocab_size": VOCABULARY,
        },
        "method": {"targets": {"q": 2, "v": 3}},
        "data": {"sequence_length": LENGTH, "global_batch_size": BATCH},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return tree


def bench(
    tree: Tree,
    out: str,
    *,
    methods: Sequence[str] = ("lora", "full"),
    steps: int = 2,
    warm_up: int = 0,
    layers: int | None = None,
    visits: int = 2,
    picture: bool = False,
    under: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Outcome:
    """Run a bench in the world this process is in, or alone, inside `under()`; the products are timed only briefly, and
    the picture, which costs more than the rest, is drawn only if asked for."""
    quick = patch.object(gemm, "CPU_SECONDS", 0.002)
    drawing = contextlib.nullcontext() if picture else patch.object(report, "draw_bench")
    try:
        with quick, drawing, under():
            run_bench(
                parse_config(tree), methods=methods, steps=steps, warm_up=warm_up, layers=layers, out=out, visits=visits
            )
    except UserError as error:
        return Outcome(error.exit_status, str(error))
    return Outcome()


def report_of(out: Path) -> Tree:
    """report.json."""
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def row_of(results: Tree, method: str, layers: int) -> Tree:
    """The only row of a case."""
    (row,) = [row for row in results["rows"] if (row["method"], row["layers"]) == (method, layers)]
    return row


def base_parameters(layers: int, *, vocabulary: int) -> int:
    """Of the base: per layer the linear weights, their 9 h biases and two norms; embeddings and the last norm."""
    return layers * (LINEAR + 9 * HIDDEN + 4 * HIDDEN) + (vocabulary + LENGTH) * HIDDEN + 2 * HIDDEN

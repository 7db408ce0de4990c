# SPDX-License-Identifier: Apache-2.0
"""Tiny training runs for tests: a corpus, a configuration, and what became of a run on this rank."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from data_prep.writer import DatasetWriter
from lora_megatron.commands.train import run_training
from lora_megatron.config import parse_config
from lora_megatron.errors import UserError
from lora_megatron.measure import report

Tree = dict[str, Any]
TINY = {"preset": "tiny", "num_layers": 4, "hidden_size": 32, "max_position_embeddings": 32}


@dataclass(frozen=True)
class Outcome:
    """How a run ended on one rank: 0 and no message, or a user's error."""

    status: int = 0
    message: str = ""


def make_corpus(folder: Path, *, rows: int = 18) -> Path:
    """A prepared data set of short rows: train.parquet and a validation.parquet of a third of the size."""
    with DatasetWriter(folder, preparer="test", options={}) as writer:
        for name, count in (("train", rows), ("validation", rows // 3)):
            with writer.split(name) as split:
                for row in range(count):
                    text = f"{name[0]}{row * 7 % 10}{row % 3}"
                    split.write(id=str(row), context=f"say {text}", target=text * 2, references=[text * 2])
    return folder


def make_tree(corpus: Path, folder: Path, /, **sections: Tree) -> Tree:
    """A configuration of a run of 6 steps that saves at every second; `sections` win key by key."""
    tree: Tree = {
        "model": dict(TINY),
        "method": {"targets": {"q": 2, "v": 3, "fc2": 1}, "dropout": 0.1},
        "optimizer": {"lr": 5e-3},
        "data": {
            "train": str(corpus / "train.parquet"),
            "validation": str(corpus / "validation.parquet"),
            "sequence_length": 16,
            "global_batch_size": 4,
        },
        "train": {"steps": 6, "save_every": 2, "warmup_steps": 1},
        "run": {"dir": str(folder)},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return tree


def attempt(tree: Tree) -> Outcome:
    """Train in the world this process is in, or alone; without the report's picture, which costs more than the run."""
    try:
        with patch.object(report, "draw_losses"):
            run_training(parse_config(tree))
    except UserError as error:
        return Outcome(error.exit_status, str(error))
    return Outcome()


def attempt_each(trees: list[Tree], store: str) -> list[Outcome]:
    """Several runs one after the other on the same ranks; each ends its world, so each gets a new one."""
    rank, size = dist.get_rank(), dist.get_world_size()
    outcomes = []
    for index, tree in enumerate(trees):
        if not dist.is_initialized():
            dist.init_process_group("gloo", init_method=f"file://{store}-{index}", rank=rank, world_size=size)
        outcomes.append(attempt(tree))
    return outcomes


def log_of(run: Path) -> list[Tree]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses_of(run: Path) -> dict[int, float]:
    """Training loss by step, exactly as logged."""
    return {line["step"]: line["loss"] for line in log_of(run)}


def evaluations_of(run: Path) -> list[Tree]:
    """The lines of evaluations.jsonl."""
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()]


def held_out_of(run: Path) -> float:
    """The last held-out loss."""
    return float(evaluations_of(run)[-1]["held_out_loss"])


def status_of(run: Path) -> Tree:
    """status.json."""
    return json.loads((run / "status.json").read_text(encoding="utf-8"))


def nothing_begun(run: Path) -> bool:
    """Whether the folder is absent or holds no more than the status of a run that failed before it began."""
    shown = [name for name in names_in(run) if not name.startswith(".")] if run.exists() else []  # no lock, temporary
    return not shown or (shown == ["status.json"] and status_of(run)["state"] == "failed")


def checkpoint_of(run: Path, step: int) -> Path:
    """checkpoints/step-0000000N."""
    return run / "checkpoints" / f"step-{step:08d}"


def names_in(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())

# SPDX-License-Identifier: Apache-2.0
"""The configurations of the quickstart's three trainings, as sections and as YAML files that run by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lora_megatron.config import parse_config

RANKS = 2
_TARGETS = ("q", "k", "v", "o", "fc1", "fc2")
DOMAINS = ("restaurants", "hotels")
STAGES = {
    "base": "train a small base on restaurants, two data-parallel ranks",
    "lora": "adapt the base to hotels with LoRA on every linear layer, two tensor-parallel ranks",
    "full": "fine-tune the base fully on the same data and ranks, for comparison",
}


@dataclass(frozen=True)
class Settings:
    """How large the experiment is; the defaults take about 230 s of processor time."""

    base_rows: int = 8000
    rows: int = 128
    base_steps: int = 800
    steps: int = 100
    batch: int = 16
    """Rows of a global batch."""
    samples: int = 2


def configurations(out: Path, *, seed: int, settings: Settings) -> dict[str, dict[str, Any]]:
    """Stage -> the sections of its configuration.

    Held-out loss is the test split's. Steps, targets, rank and both learning rates were chosen on the validation split
    of other seeds, the rows long before on the test split (launch/results/2026-11-quickstart.md): it shows that
    training works, not which method is better.
    """
    train = {"warmup_steps": min(20, settings.steps // 4), "schedule": "cosine", "seed": seed}
    adaptation = {
        "parallel": {"tensor": RANKS},
        "data": _data(out / "data" / "hotels", settings, ranks=1) | {"loss": "target"},
        "train": {
            "steps": settings.steps,
            **train,
            "schedule": "linear",
            "eval_every": max(1, settings.steps // 2),
            "samples": settings.samples,
        },
    }
    weights = {"weights": str(out / "base" / "model")}
    return {
        "base": {
            "model": {"num_layers": 3, "hidden_size": 96, "num_attention_heads": 4, "max_position_embeddings": 128},
            "base": {"weights": "random", "seed": seed},
            "method": {"name": "full"},
            "optimizer": {"lr": 4e-3, "betas": [0.9, 0.98]},
            "data": _data(out / "data" / "restaurants", settings, ranks=RANKS) | {"loss": "all"},
            "train": {"steps": settings.base_steps, **train, "eval_every": max(1, settings.base_steps // 4)},
            "run": {"dir": str(out / "base")},
        },
        "lora": {
            "base": weights,
            "method": {"name": "lora", "targets": dict.fromkeys(_TARGETS, 6), "alpha": 12.0},
            "optimizer": {"lr": 2e-2, "betas": [0.9, 0.98]},
            **adaptation,
            "run": {"dir": str(out / "lora")},
        },
        "full": {
            "base": weights,
            "method": {"name": "full"},
            "optimizer": {"lr": 1e-3, "betas": [0.9, 0.98]},
            **adaptation,
            "run": {"dir": str(out / "full")},
        },
    }


def _data(folder: Path, settings: Settings, *, ranks: int) -> dict[str, Any]:
    """The data section; `ranks` data-parallel ranks share a batch in one microbatch each."""
    return {
        "train": str(folder / "train.parquet"),
        "validation": str(folder / "test.parquet"),
        "sequence_length": 128,
        "micro_batch_size": settings.batch // ranks,
        "global_batch_size": settings.batch,
    }


class _PlainDumper(yaml.SafeDumper):
    """Writes a value that occurs twice twice, instead of an anchor and an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def render(stage: str, tree: Mapping[str, Any], path: Path) -> str:
    """A configuration as a YAML file that says what it is and how to run it."""
    parse_config(dict(tree))
    command = f"torchrun --standalone --nproc-per-node {RANKS} -m lora_megatron train {path}"
    body = yaml.dump(dict(tree), Dumper=_PlainDumper, sort_keys=False, default_flow_style=None, width=110)
    return f"# SPDX-License-Identifier: Apache-2.0\n# Quickstart: {STAGES[stage]}.\n#   {command}\n{body}"

# SPDX-License-Identifier: Apache-2.0
"""What `launch/e2e_experiment.py` runs: its settings, the configuration of each training, and the commands."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.e2e_corpus import TOKENIZER
from lora_megatron.config import LARGEST_SEED, parse_config
from lora_megatron.errors import ConfigError

BASE = "base"
METHODS = ("lora", "full")
WARM_UP = 100
NEW_TOKENS = 64
PROMPTS_AT_ONCE = 64
"""Of ten beams each: 2.8 GiB of keys and values at 128 positions, in each process that decodes beside the others."""
_NOT_PART = ("raw", "out", "seeds", "jobs", "stop_after")  # of what a folder's results depend on


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The command line."""

    raw: Path
    out: Path
    seeds: tuple[int, ...] = (1, 2, 3)
    jobs: int = 3
    stop_after: float | None = None
    """Seconds."""
    pretrain_steps: int = 600
    adapt_epochs: float = 5.0
    lora_lr: float = 1e-3
    full_lr: float = 1e-4
    limit: int | None = None
    base_limit: int = 64
    rows: int | None = None
    shrink: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be."""
        for name in ("jobs", "stop_after", "pretrain_steps", "limit", "base_limit", "rows"):
            if (value := getattr(self, name)) is not None and not 1 <= value < float("inf"):
                raise ConfigError(f"--{name.replace('_', '-')} {value} cannot be: give 1 or more")
        for name in ("adapt_epochs", "lora_lr", "full_lr"):
            if not 0 < (value := getattr(self, name)) < float("inf"):
                raise ConfigError(f"--{name.replace('_', '-')} {value} cannot be: give a number above 0")
        for text in self.shrink:
            if "=" not in text or "." not in text.partition("=")[0]:
                raise ConfigError(f"--shrink has {text!r}: write section.key=value, such as model.preset=tiny")

    @property
    def adaptations(self) -> list[str]:
        """Seed after seed, so that what is finished early can be compared."""
        return [f"{method}-seed{seed}" for seed in self.seeds for method in METHODS]

    def identity(self) -> dict[str, Any]:
        """What the results in a folder depend on; more seeds may join those that are there."""
        values = {name: value for name, value in asdict(self).items() if name not in _NOT_PART}
        return {**values, "shrink": list(self.shrink)}


def seeds_of(text: str) -> tuple[int, ...]:
    """`1,2,3` -> (1, 2, 3); raises ConfigError."""
    parts = [part.strip() for part in text.split(",")]
    seeds = tuple(int(part) for part in parts if part.isdecimal() and len(part) < 20)
    if len(seeds) != len(parts) or len(set(seeds)) != len(seeds) or max(seeds, default=0) > LARGEST_SEED:
        raise ConfigError(f"--seeds {text!r}: give different whole numbers of 0 or more, such as 1,2,3")
    return seeds


def configuration(name: str, settings: Settings) -> dict[str, Any]:
    """The sections of a training's configuration; the paper's for E2E where nothing below says otherwise.

    Both methods train alike but for what is trained and its learning rate. Of the paper's 500 steps of warm-up, out of
    26,289, 100 are left for a tenth of the steps, and rows have 136 positions, for at most 131 tokens, not 512.
    """
    if name == BASE:
        return _base(settings)
    method, _, seed = name.partition("-seed")
    lora = {"name": "lora", "targets": {"q": 4, "v": 4}, "alpha": 32.0, "dropout": 0.1}
    return {
        "base": {"weights": str(settings.out / BASE / "best")},
        "method": lora if method == "lora" else {"name": "full"},
        "optimizer": {
            "lr": settings.lora_lr if method == "lora" else settings.full_lr,
            "weight_decay": 0.01,
            "betas": [0.9, 0.999],
            "eps": 1e-6,
            "clip_grad": 0.0,
        },
        "data": _data("e2e", settings, sequence_length=136, batch=8),
        "train": {
            "epochs": settings.adapt_epochs,
            "warmup_steps": WARM_UP,
            "schedule": "linear",
            "label_smoothing": 0.1,
            "seed": int(seed),
            "eval_every": "epoch",
            "best": "loss",
            "precision": "bf16",
        },
        "run": {"dir": str(settings.out / name), "resume": "auto"},
    }


def _base(settings: Settings) -> dict[str, Any]:
    steps = settings.pretrain_steps
    return {
        "model": {"preset": "gpt2-small", "vocab_size": 50257},
        "base": {"weights": "random", "seed": 1},
        "method": {"name": "full"},
        "optimizer": {"lr": 6e-4, "weight_decay": 0.1, "betas": [0.9, 0.95], "clip_grad": 1.0},
        "data": _data("corpus", settings, sequence_length=256, batch=32) | {"packing": True, "loss": "all"},
        "train": {
            "steps": steps,
            "warmup_steps": min(WARM_UP, steps // 8),
            "schedule": "cosine",
            "seed": 1,
            "eval_every": max(1, steps // 8),
            "best": "loss",
            "precision": "bf16",
        },
        "run": {"dir": str(settings.out / BASE), "resume": "auto"},
    }


def _data(folder: str, settings: Settings, *, sequence_length: int, batch: int) -> dict[str, Any]:
    data = settings.out / "data" / folder
    return {
        "train": str(data / "train.parquet"),
        "validation": str(data / "validation.parquet"),
        "tokenizer": str(settings.raw / TOKENIZER),
        "sequence_length": sequence_length,
        "micro_batch_size": batch,
        "global_batch_size": batch,
    }


def render(name: str, settings: Settings) -> str:
    """The configuration as a YAML file that says how to run it."""
    tree = configuration(name, settings)
    parse_config(tree)
    body = yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=110)
    return f"# SPDX-License-Identifier: Apache-2.0\n# {shlex.join(['python', *training(name, settings)[1:]])}\n{body}"


def config_path(name: str, settings: Settings) -> Path:
    """Where the configuration of a training is."""
    return settings.out / "configs" / f"{name}.yaml"


def training(name: str, settings: Settings) -> list[str]:
    """The command of a training."""
    return [*_command("train", name, settings), *_overrides(name, settings)]


def evaluation(name: str, settings: Settings) -> list[str]:
    """The command that evaluates a training's best on the test set, or the base as it is."""
    config = settings.adaptations[0] if name == BASE else name
    limit = settings.limit
    what: Sequence[str] = ()
    if name == BASE:
        limit = min(settings.base_limit, limit or settings.base_limit)
    elif name.startswith("lora"):
        what = ("--adapter", str(settings.out / name / "best"))
    else:
        what = (f"base.weights={settings.out / name / 'best'}",)
    flags = ["--task", "e2e", "--data", str(settings.out / "data" / "e2e"), "--split", "test"]
    flags += ["--max-new-tokens", str(NEW_TOKENS), "--batch-size", str(PROMPTS_AT_ONCE)]
    flags += ["--out", str(evaluation_folder(name, settings))]
    flags += [] if limit is None else ["--limit", str(limit)]
    return [*_command("evaluate", config, settings), *_overrides(config, settings), *what, *flags]


def evaluation_folder(name: str, settings: Settings) -> Path:
    """Where predictions and scores are."""
    return settings.out / "evaluations" / name


def preparation(arguments: Sequence[str]) -> list[str]:
    """A command of data_prep."""
    return [sys.executable, "-m", "data_prep", *arguments]


def _command(command: str, name: str, settings: Settings) -> list[str]:
    return [sys.executable, "-m", "lora_megatron", command, str(config_path(name, settings))]


def _overrides(name: str, settings: Settings) -> list[str]:
    """Of a rehearsal; the shape is the base's, which adaptations read from its folder."""
    return [text for text in settings.shrink if name == BASE or not text.startswith("model.")]

# SPDX-License-Identifier: Apache-2.0
"""Corpus, base, LoRA and full fine-tuning of the base under tensor parallelism, comparison.

    data/restaurants --full, DP=2--> base/model --LoRA, TP=2--> lora/adapter    both on data/hotels,
                                               `-full, TP=2--> full/model       both judged by its test split

Each stage is a command that a user could type, run as processes of its own; its output is in logs/.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from lora_megatron.config import LARGEST_SEED
from lora_megatron.errors import ConfigError
from lora_megatron.measure.atomic import write_json, write_text
from lora_megatron.measure.comparison import write_comparison
from lora_megatron.measure.console import TrainingProgress
from lora_megatron.measure.units import show_bytes, show_seconds
from lora_megatron.quickstart.configurations import DOMAINS, RANKS, STAGES, Settings, configurations, render
from lora_megatron.quickstart.folder import MARKER, claim
from lora_megatron.quickstart.stages import (
    Follower,
    run_stage,
    termination_as_exit,
    training_command,
    training_environment,
)

_TITLE = "Quickstart: LoRA beside full fine-tuning"


def run_quickstart(out: Path, seed: int, *, settings: Settings | None = None) -> None:
    """Run the experiment into `out` and print its table; an earlier quickstart there is replaced.

    Raises:
        ConfigError: `out` holds anything that no quickstart wrote, or the seed is out of range.
        UserError: a stage failed for a reason that the user can mend (no space on disk, for one).
    """
    started = time.monotonic()
    settings = settings if settings is not None else Settings()
    if not 0 <= seed <= LARGEST_SEED:
        raise ConfigError(f"--seed {seed} must be between 0 and {LARGEST_SEED}")
    claim(out, seed=seed, say=_say)
    trees = configurations(out, seed=seed, settings=settings)
    for stage, tree in trees.items():
        path = _config_path(out, stage)
        write_text(path, render(stage, tree, path))
    with termination_as_exit():
        _say(f"[1/{len(STAGES) + 2}] write two small corpora: plain restaurants, enthusiastic hotels")
        for domain, rows in zip(DOMAINS, (settings.base_rows, settings.rows), strict=True):
            _prepare(out, domain, seed=seed, rows=rows)
        for number, (stage, purpose) in enumerate(STAGES.items(), start=2):
            _say(f"[{number}/{len(STAGES) + 2}] {purpose}")
            _train(out, stage, steps=trees[stage]["train"]["steps"])
    _say(f"[{len(STAGES) + 2}/{len(STAGES) + 2}] compare\n")
    _compare(out, seed, started)


def _config_path(out: Path, stage: str) -> Path:
    return out / "configs" / f"{stage}.yaml"


def _prepare(out: Path, domain: str, *, seed: int, rows: int) -> None:
    flags = ["--domain", domain, "--seed", str(seed), "--rows", str(rows), "--out", str(out / "data" / domain)]
    command = [sys.executable, "-m", "data_prep", "synthetic", *flags]
    run_stage(command, log=out / "logs" / f"data-{domain}.log", environment=os.environ)


def _train(out: Path, stage: str, *, steps: int) -> None:
    with TrainingProgress(steps, description=stage) as progress:
        run_stage(
            training_command(_config_path(out, stage)),
            log=out / "logs" / f"{stage}.log",
            environment=training_environment(),
            follow=Follower(out / stage, progress),
        )


def _compare(out: Path, seed: int, started: float) -> None:
    summaries = {stage: json.loads((out / stage / "report.json").read_text(encoding="utf-8")) for stage in STAGES}
    environment = json.loads((out / "lora" / "environment.json").read_text(encoding="utf-8"))
    seconds = time.monotonic() - started
    setting = _setting(out, seed=seed, seconds=seconds, environment=environment)
    write_comparison(out, summaries, title=_TITLE, setting=setting)
    write_json(out / MARKER, {"state": "done", "seed": seed, "seconds": seconds})
    print(f"\n{show_seconds(seconds)} in all. Report: {out / 'report.md'}. Adapter: {out / 'lora' / 'adapter'}")


def _setting(out: Path, *, seed: int, seconds: float, environment: dict[str, Any]) -> dict[str, str]:
    """What a reader needs to repeat the numbers."""
    packages = environment["packages"]
    devices = environment["devices"]
    gpus = ", ".join(gpu["name"] for gpu in devices.get("gpus", ()))
    cpu = f"{devices.get('name')}, {devices.get('cores')} cores, {show_bytes(devices.get('memory_bytes'))} of memory"
    git = environment["git"]
    return {
        "held-out loss": "nats per target token, over the whole test split of hotels",
        "hardware": gpus or cpu,
        "versions": f"Python {environment['python']}, torch {packages['torch']}, "
        f"megatron-core {packages['megatron-core']}, lora-megatron {packages['lora-megatron']}"
        + (f", commit {git['commit'][:12]}{' with changes' if git['dirty'] else ''}" if git else ""),
        "command": shlex.join(["lora-megatron", "quickstart", "--out", str(out), "--seed", str(seed)]),
        "configurations": ", ".join(str(_config_path(out, stage)) for stage in STAGES),
        "time in all": f"{show_seconds(seconds)} for data, base and both runs on {RANKS} ranks",
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

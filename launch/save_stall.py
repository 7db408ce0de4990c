# SPDX-License-Identifier: Apache-2.0
"""How long a save holds up training, in the background and not.

    python launch/save_stall.py

On a CPU it trains a whole model of 20 million parameters in fp32, on a GPU LoRA of rank 128 on q and v of eight layers
of width 4096 in bf16: checkpoints of about 240 MB either way. Four saves a run, far enough apart that none waits for
the one before; the last is left out, as the run waits for it. Needs the repository.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from lora_megatron.checkpoint import tensors
from lora_megatron.commands.saving import Saver
from lora_megatron.measure.console import print_table
from tests.commands.runs import Outcome, attempt, make_corpus, make_tree

Sections = dict[str, dict[str, Any]]
SAVES = 4
ON_CPU: Sections = {
    "model": {"num_layers": 5, "hidden_size": 576, "num_attention_heads": 8},
    "method": {"name": "full", "targets": {}, "dropout": 0.0},
    "train": {"save_every": 8},
}
ON_GPU: Sections = {
    "model": {"num_layers": 8, "hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 512},
    "method": {"targets": {"q": 128, "v": 128}, "dropout": 0.0},
    "data": {"sequence_length": 512, "micro_batch_size": 4},
    "train": {"save_every": 60, "precision": "bf16"},
}


def measure(corpus: Path, run: Path, *, async_save: bool) -> tuple[list[float], float, int]:
    """Seconds that each save but the last held up training, median step time, bytes of a checkpoint."""
    sections = ON_GPU if torch.cuda.is_available() else ON_CPU
    tree = make_tree(corpus, run, **sections)
    tree["data"]["validation"] = None
    tree["train"].update(steps=SAVES * tree["train"]["save_every"], async_save=async_save)
    save, stalls = Saver.save, []

    def timed(saver: Saver) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        save(saver)
        stalls.append(time.perf_counter() - started)

    with patch.object(Saver, "save", timed):
        assert attempt(tree) == Outcome()
    newest = max((run / "checkpoints").iterdir())
    steps = [json.loads(line)["step_seconds"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    size = sum(path.stat().st_size for path in newest.iterdir())
    shutil.rmtree(run)
    return stalls[: SAVES - 1], statistics.median(steps), size


def main() -> int:
    """Measure each way twice, in turn, and print a table; a first run only warms up."""
    torch.set_num_threads(1)
    ways: dict[str, tuple[bool, int]] = {"background": (True, 2**30), "in the way": (False, 2**30)}
    if torch.cuda.is_available():
        ways["background, pageable"] = (True, 0)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        corpus = make_corpus(Path(scratch) / "corpus", rows=60)
        measure(corpus, Path(scratch) / "run", async_save=True)
        for name, (async_save, page_locked) in [*ways.items()] * 2:
            with patch.object(tensors, "_MOST_PAGE_LOCKED", page_locked):
                stalls, step, size = measure(corpus, Path(scratch) / "run", async_save=async_save)
            rows.append([name, " ".join(f"{s:.3f}" for s in stalls), f"{step:.4f}", f"{size / 1e6:.0f} MB"])
    print_table("a save holds up training", ["saving", "seconds a save", "seconds a step", "checkpoint"], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""What `launch/one_host.py` proves with `lora-megatron train`: an adapter at another layout, a run that was stopped.

The base is random and the same under every layout (`model.initialise`: a function of seed and name), so nothing of its
size is stored. The runs:

    uninterrupted    TP=N, S steps; the held-out loss before and after, the adapter
    reloaded         the adapter as method.start_from at TP=N/2 x PP=2 (PP=2 on two), no step: the held-out loss, and
                     the adapter written again
    stopped          as uninterrupted, told to stop by SIGTERM in the middle, and started again with run.resume=auto
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.grammar import DOMAINS
from data_prep.synthetic import distinct_pairs
from data_prep.writer import DatasetWriter
from launch.one_host_report import ROUNDING
from launch.one_host_rows import TIMEOUT
from launch.warm_ranks import launch_environment, told
from lora_megatron.errors import EXIT_DONE, EXIT_PREEMPTED
from lora_megatron.parallel.launcher import die_with_parent

BATCH = 4
"""Rows in a step."""
_HELD_OUT_ROWS, _TRAIN_ROWS = 8, 64
_SENTENCES = 12  # of a row: most of a sequence of 2048 bytes
_LOOK_S = 0.05
_KILL_S = 30.0


@dataclass(frozen=True)
class Proof:
    """The runs of one session: where, of which model, how long."""

    folder: Path
    config: str
    overrides: Sequence[str]
    gpus: int
    layers: int
    steps: int
    micro_batch: int
    """At tensor parallelism alone; 1 in a pipeline."""
    lr: float = 0.01

    @property
    def middle(self) -> int:
        """The step after which the stopped run is told to stop."""
        return self.steps // 2

    @property
    def other(self) -> str:
        """The layout at which the adapter is loaded again."""
        return f"TP={self.gpus // 2} x PP=2" if self.gpus > 2 else "PP=2"

    def run_folder(self, name: str) -> Path:
        return self.folder / name

    def words(self, name: str) -> list[str]:
        """`train ...` of the run of that name."""
        tensor, pipeline = (self.gpus // 2, 2) if name == "reloaded" else (self.gpus, 1)
        data = self.folder / "corpus"
        words = [
            f"optimizer.lr={self.lr:g}",
            *self.overrides,
            f"model.num_layers={self.layers}",
            f"parallel.tensor={tensor}",
            f"parallel.pipeline={pipeline}",
            f"parallel.sequence={'true' if tensor > 1 else 'false'}",
            f"parallel.tp_comm_overlap={'true' if tensor > 1 else 'false'}",
            TIMEOUT,
            f"data.train={data / 'train.parquet'}",
            f"data.validation={data / 'validation.parquet'}",
            "data.tokenizer=bytes",
            "data.loss=all",
            f"data.micro_batch_size={self.micro_batch if pipeline == 1 else 1}",
            f"data.global_batch_size={BATCH}",
            "train.schedule=constant",
            f"run.dir={self.run_folder(name)}",
        ]
        if name == "reloaded":
            start = f"method.start_from={self.run_folder('uninterrupted') / 'adapter'}"
            return ["train", self.config, *words, "train.steps=0", "train.eval_every=1", start]
        return ["train", self.config, *words, f"train.steps={self.steps}", f"train.eval_every={self.steps}"]


def write_corpus(folder: Path) -> None:
    """Sentences about hotels, the same bytes every time."""
    pairs = distinct_pairs(DOMAINS["hotels"], 1)
    with DatasetWriter(folder, preparer="one_host", options={}) as writer:
        for name, rows in (("train", _TRAIN_ROWS), ("validation", _HELD_OUT_ROWS)):
            with writer.split(name) as split:
                for row in range(rows):
                    found = [next(pairs) for _ in range(_SENTENCES)]
                    target = " ".join(sentence for _, sentence in found)
                    split.write(id=str(row), context=found[0][0], target=target, references=[target])


def stop_and_resume(proof: Proof, log: Path, *, limit: float) -> str:
    """Start the run `stopped`, tell it to stop in the middle, and start it again; why that failed, or nothing."""
    deadline = time.monotonic() + limit
    words, run = proof.words("stopped"), proof.run_folder("stopped")
    status = _launch(words, log, proof, deadline=deadline, stop_after=run / "metrics.jsonl")
    if status is None:
        return f"took longer than its time and was ended{told(log)}"
    if status == EXIT_DONE:
        return "the run was over before it could be stopped: give it more --proof-steps"
    if status != EXIT_PREEMPTED:
        return f"the run that was told to stop ended with status {status}, not {EXIT_PREEMPTED}{told(log)}"
    status = _launch([*words, "run.resume=auto"], log, proof, deadline=deadline)
    if status != EXIT_DONE:
        ended = "took longer than its time" if status is None else f"ended with status {status}"
        return f"the run that was started again {ended}{told(log)}"
    return ""


def _launch(
    words: Sequence[str], log: Path, proof: Proof, *, deadline: float, stop_after: Path | None = None
) -> int | None:
    """The exit status of what `launch/torchrun.sh` runs; None where the time was over.

    stop_after: a log of steps; SIGTERM follows its line number `proof.middle`.
    """
    environment = {**launch_environment(proof.gpus), "NPROC_PER_NODE": str(proof.gpus)}
    with open(log, "ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "lora_megatron.commands.launch", *words],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env=environment,
            preexec_fn=die_with_parent,
        )
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if stop_after and stop_after.exists() and stop_after.read_bytes().count(b"\n") >= proof.middle:
                process.send_signal(signal.SIGTERM)
                stop_after = None
            time.sleep(_LOOK_S)
        return process.poll()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(_KILL_S)


def adapter_facts(proof: Proof) -> dict[str, Any]:
    """The adapter's size, the losses at both layouts, and whether the other layout writes the same bytes."""
    before, after = (line["held_out_loss"] for line in _lines(proof.run_folder("uninterrupted") / "evaluations.jsonl"))
    (again,) = (line["held_out_loss"] for line in _lines(proof.run_folder("reloaded") / "evaluations.jsonl"))
    files = [proof.run_folder(name) / "adapter" / "adapter_model.safetensors" for name in ("uninterrupted", "reloaded")]
    difference, change = abs(again - after) / after, abs(after - before) / after
    return {
        "layers": proof.layers,
        "bytes": os.path.getsize(files[0]),
        "same_bytes": files[0].read_bytes() == files[1].read_bytes(),
        "layout": f"TP={proof.gpus}",
        "other_layout": proof.other,
        "loss_without": before,
        "loss": after,
        "loss_again": again,
        "difference": difference,
        "change": change,
        # Were nothing loaded, the loss would be off by what the adapter changed.
        "holds": difference <= ROUNDING and difference < change / 10,
    }


def resume_facts(proof: Proof, log: Path) -> dict[str, Any]:
    """Losses of the run that was stopped beside those of the one that was not, and both adapters."""
    resumed = re.findall(r"^resumed from .* at step (\d+)$", log.read_text(encoding="utf-8", errors="replace"), re.M)
    whole, stopped = (
        {line["step"]: line["loss"] for line in _lines(proof.run_folder(name) / "metrics.jsonl")}
        for name in ("uninterrupted", "stopped")
    )
    files = [proof.run_folder(name) / "adapter" / "adapter_model.safetensors" for name in ("uninterrupted", "stopped")]
    complete = sorted(whole) == sorted(stopped) == list(range(1, proof.steps + 1))
    differences = [abs(stopped[step] - whole[step]) / whole[step] for step in whole if step in stopped]
    return {
        "layers": proof.layers,
        "steps": proof.steps,
        "resumed_at": [int(step) for step in resumed],
        "complete": complete,
        "equal_steps": sum(stopped.get(step) == loss for step, loss in whole.items()),
        "difference": max(differences, default=None),
        "same_bytes": files[0].read_bytes() == files[1].read_bytes(),
        "losses": [[step, whole[step], stopped.get(step)] for step in sorted(whole)],
        "holds": complete and len(resumed) == 1 and max(differences) <= ROUNDING,
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

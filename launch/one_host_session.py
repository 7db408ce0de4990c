# SPDX-License-Identifier: Apache-2.0
"""The parts of `launch/one_host.py`: what each runs, and what it leaves in the report."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from launch import one_host_proofs as proofs
from launch.one_host_report import WAITING, values_of
from launch.one_host_rows import CONFIG, Choice, Row, choose_micro_batch, choose_slice, rows_for
from launch.warm_ranks import WarmRanks
from lora_megatron.errors import ConfigError
from lora_megatron.measure.units import show_bytes
from lora_megatron.model.shape import ModelShape

_PROOF_LAYERS = 8
"""Of the proofs, where not all fit."""
_STAGES = 2
"""Of the pipeline into which the adapter is loaded again."""
_LR_AT_WIDTH_1 = 12.0
"""A step of Adam moves A x by lr times the width: 0.001 for GPT-3 175B is what a few steps stand."""
Report = dict[str, Any]


@dataclass
class Part:
    """A step of the session; `run` takes the seconds it may take and fills `result`, or says why not."""

    result: Report
    run: Callable[[float], str]


def part_names(gpus: int, layers: int) -> list[str]:
    """Of all parts, in no order; raises ConfigError."""
    return [*(row.name for row in rows_for(gpus, layers)), "adapter", "resume"]


@dataclass
class Session:
    """Everything that the parts need."""

    options: argparse.Namespace
    gpus: int
    shape: ModelShape
    ranks: WarmRanks
    memory: float
    """Bytes of one GPU."""
    started: float = field(default_factory=time.monotonic)

    def parts(self) -> list[Part]:
        """In order: speed at tensor parallelism, the ratio, the adapter, the other layouts; what needs all GPUs for
        processes of its own comes last."""
        rows = [self._row(row) for row in rows_for(self.gpus, self.shape.num_layers)]
        proof = self._proof()
        adapter = _result(
            "adapter", f"the adapter of TP={self.gpus} at {proof.other}", 58, proof.words("uninterrupted")
        )
        resume = _result("resume", "a run stopped by SIGTERM and resumed", 120, proof.words("stopped"))
        return [
            *rows[:3],
            Part(adapter, lambda limit: self._adapter(proof, adapter, limit)),
            *rows[3:],
            Part(resume, lambda limit: self._resume(proof, resume, limit)),
        ]

    def _row(self, row: Row) -> Part:
        options = self.options
        choice = self._choose(row, options.overrides, most=options.micro_batch)
        sizes = {"gpus": self.gpus, "micro_batch": choice.micro_batch}
        layers = choose_slice(row, CONFIG, options.overrides, **sizes, memory=self.memory)
        words = row.command(CONFIG, options.overrides, **sizes, layers=layers)
        result = _result(row.name, row.what, row.seconds, [*words, "--out", str(options.out / row.name)])
        result |= {"goals": row.goals, "planned": _planned(choice)}
        return Part(result, lambda limit: self._bench(result, words, limit))

    def _bench(self, result: Report, words: Sequence[str], limit: float) -> str:
        folder = self.options.out / result["part"]
        log = self.options.out / f"{result['part']}.log"
        ended = self.ranks.run([*words, "--out", str(folder)], log=log, limit=limit)
        report_path = folder / "report.json"
        if not report_path.is_file():
            return ended.why or "it left no report"
        report = json.loads(report_path.read_text(encoding="utf-8"))  # what was measured before it failed counts too
        result |= {key: report[key] for key in ("rows", "ratios", "layout", "data")}
        result["values"] = values_of(result, result["goals"])
        if ended.why or not any(row["step_seconds"] for row in report["rows"]):
            return ended.why or report["rows"][0]["out_of_memory"]
        return ""

    def check_proof_layers(self) -> None:
        """Raise ConfigError for a --proof-layers with which the proofs cannot run."""
        asked, every = self.options.proof_layers, self.shape.num_layers
        if asked is None:
            return
        if asked > every:
            raise ConfigError(
                f"--proof-layers {asked}: the model has {every} layers; give at most that, or leave it out"
            )
        if asked % _STAGES:
            raise ConfigError(
                f"--proof-layers {asked}: a proof loads its adapter into a pipeline of {_STAGES} stages; give a "
                f"multiple of {_STAGES}, or leave it out"
            )
        chosen = self._choose_for_proof(asked)
        if not chosen.fits:
            raise ConfigError(
                f"--proof-layers {asked}: by the plan they need {show_bytes(chosen.planned_bytes)} of a GPU with "
                f"{show_bytes(self.memory)}; give fewer, or leave it out"
            )

    def _proof(self) -> proofs.Proof:
        """On the layers asked for; else on all, or on some where all do not fit."""
        options = self.options
        layers = options.proof_layers or self.shape.num_layers
        chosen = self._choose_for_proof(layers)
        if not chosen.fits and options.proof_layers is None:
            layers = min(layers, _PROOF_LAYERS)
        return proofs.Proof(
            folder=options.out / "proofs",
            config=CONFIG,
            overrides=options.overrides,
            gpus=self.gpus,
            layers=layers,
            steps=options.proof_steps,
            micro_batch=chosen.micro_batch,
            lr=min(0.01, _LR_AT_WIDTH_1 / self.shape.hidden_size),
        )

    def _choose(self, row: Row, overrides: Sequence[str], *, most: int) -> Choice:
        return choose_micro_batch(row, CONFIG, overrides, gpus=self.gpus, memory=self.memory, most=most)

    def _choose_for_proof(self, layers: int) -> Choice:
        row = rows_for(self.gpus, self.shape.num_layers)[0]
        return self._choose(row, [*self.options.overrides, f"model.num_layers={layers}"], most=proofs.BATCH)

    def _adapter(self, proof: proofs.Proof, result: Report, limit: float) -> str:
        deadline = time.monotonic() + limit
        proofs.write_corpus(proof.folder / "corpus")
        for name in ("uninterrupted", "reloaded"):
            log = self.options.out / f"{name}.log"
            ended = self.ranks.run(proof.words(name), log=log, limit=deadline - time.monotonic())
            if ended.why:
                return f"the run {name} {ended.why}"
        result["facts"] = proofs.adapter_facts(proof)
        return ""

    def _resume(self, proof: proofs.Proof, result: Report, limit: float) -> str:
        if not (proof.run_folder("uninterrupted") / "adapter").is_dir():
            return "there is no uninterrupted run to compare with"
        self.ranks.stop()
        log = self.options.out / "stopped.log"
        if why := proofs.stop_and_resume(proof, log, limit=limit):
            return why
        result["facts"] = proofs.resume_facts(proof, log)
        return ""

    def left(self) -> float:
        """Seconds of the budget."""
        return float(self.options.budget - (time.monotonic() - self.started))


def _result(name: str, what: str, seconds: float, words: Sequence[str]) -> Report:
    command = shlex.join(["lora-megatron", *words])
    common: Report = {"part": name, "what": what, "planned_seconds": seconds, "seconds": None, "state": WAITING}
    return {**common, "why": "", "command": command, "values": []}


def _planned(choice: Choice) -> Report:
    return {"micro_batch": choice.micro_batch, "bytes": choice.planned_bytes, "whole_model_fits": choice.fits}

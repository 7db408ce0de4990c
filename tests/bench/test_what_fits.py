# SPDX-License-Identifier: Apache-2.0
"""Models that do not fit: slices and what they say of the whole, methods that run out of memory, memory given back."""

from __future__ import annotations

import contextlib
import gc
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from lora_megatron.bench import measurement, plans
from lora_megatron.bench.measurement import Case
from lora_megatron.bench.timing import StepSeconds, timed_step
from lora_megatron.checkpoint.base import save_model
from lora_megatron.config import parse_config
from lora_megatron.methods.choose import choose_method
from lora_megatron.model.build import BuildOptions, build
from lora_megatron.model.checks import layout_of
from lora_megatron.model.presets import resolve_shape
from lora_megatron.parallel.groups import build_mesh
from lora_megatron.planning.recompute import SHARE
from tests.bench.benches import LAYERS, VOCABULARY, base_parameters, bench, make_tree, report_of, row_of
from tests.commands.runs import Outcome, names_in
from tests.pool import Pool


@contextlib.contextmanager
def planted_law() -> Iterator[None]:
    """Every step is taken, and said to have lasted 10 ms and 5 ms a layer; a tenth of it in the optimizer."""

    def step(trainer: Any) -> Any:
        _, report = timed_step(trainer)
        seconds = 0.010 + 0.005 * len(trainer.chunks[0].module.decoder.layers)
        return StepSeconds(seconds, 0.1 * seconds), report

    with patch.object(measurement, "timed_step", step):
        yield


def test_slices_extrapolate_a_planted_law(pool: Pool, tmp_path: Path) -> None:
    """12 layers from slices of 2 and 4: the time planted, and the memory that the plan of 12 layers has."""
    tree = make_tree(model={"num_layers": 12})
    assert pool.run(1, bench, tree=tree, out=str(tmp_path), layers=4, under=planted_law) == [Outcome()]
    report = report_of(tmp_path)
    for method in ("lora", "full"):
        row = row_of(report, method, 12)
        assert row["extrapolated_from"] == [2, 4]
        assert row["step_seconds"]["median"] == pytest.approx(0.070)
        assert row["optimizer_seconds"]["median"] == pytest.approx(0.007)
        assert row["peak_bytes"] == pytest.approx(row["planned_peak_bytes"], rel=0.02)
    assert row_of(report, "full", 12)["total_parameters"] == base_parameters(12, vocabulary=VOCABULARY)
    assert [row["layers"] for row in report["headline"]] == [12, 12]
    text = (tmp_path / "report.md").read_text()
    assert "12 layers (from 2 and 4)" in text
    assert "the first 2 and 4 of 12 layers were measured" in text


@contextlib.contextmanager
def room_for(memory: int) -> Iterator[None]:
    with patch.object(plans, "free_for_this_rank", lambda: memory), planted_law():
        yield


def bench_with_room(memory: int, tree: dict[str, Any], out: str, methods: tuple[str, ...]) -> Outcome:
    return bench(tree, out, methods=methods, under=lambda: room_for(memory))


def planned_bytes(tree: dict[str, Any], cases: list[tuple[str, int]]) -> list[int]:
    """What the plan says that a device needs for each case."""
    config = parse_config(tree)
    build_mesh(layout_of(config), seed=1)
    shape = resolve_shape(config.model, tokenizer_vocab_size=VOCABULARY)
    return [plans.plan_case(Case(*case), config, shape).allocated for case in cases]


def test_as_many_layers_as_fit_are_measured(pool: Pool, tmp_path: Path) -> None:
    """Room for LoRA's whole model and not for full fine-tuning's: both are sliced, and LoRA is measured whole too."""
    tree = make_tree()
    needed = pool.run(1, planned_bytes, tree=tree, cases=[("lora", LAYERS), ("full", LAYERS), ("full", 2)])[0]
    room = (needed[0] + needed[1]) // 2
    assert max(needed[0], needed[2]) < room < needed[1]
    memory = int(room / SHARE)
    outcome = pool.run(1, bench_with_room, memory=memory, tree=make_tree(), out=str(tmp_path), methods=("lora", "full"))
    assert outcome == [Outcome()]
    report = report_of(tmp_path)
    measured = {(row["method"], row["layers"]) for row in report["rows"] if not row["extrapolated_from"]}
    assert ("lora", LAYERS) in measured
    assert ("full", LAYERS) not in measured
    largest = max(layers for method, layers in measured if method == "full")
    assert largest < LAYERS
    assert row_of(report, "lora", LAYERS)["slices_said"]["step_seconds"]["median"] == pytest.approx(0.030)
    assert row_of(report, "full", LAYERS)["extrapolated_from"] == [largest // 2, largest]
    (said,) = [ratio for ratio in report["ratios"] if ratio["layers"] == LAYERS]
    assert said["extrapolated"]


def test_a_method_of_which_not_one_layer_fits_is_tried_and_the_others_get_two_slices(
    pool: Pool, tmp_path: Path
) -> None:
    """On a CPU nothing stops what does not fit by the plan, so its row is there."""
    tree = make_tree()
    needed = pool.run(1, planned_bytes, tree=tree, cases=[("lora", 2), ("full", 1), ("lora", LAYERS)])[0]
    room = (needed[0] + needed[2]) // 2
    assert needed[0] < room < min(needed[1:])
    memory = int(room / SHARE)
    outcome = pool.run(1, bench_with_room, memory=memory, tree=tree, out=str(tmp_path), methods=("lora", "full"))
    assert outcome == [Outcome()]
    report = report_of(tmp_path)
    measured = {(row["method"], row["layers"]) for row in report["rows"] if not row["extrapolated_from"]}
    assert ("full", 1) in measured
    assert len([layers for method, layers in measured if method == "lora"]) == 2
    assert row_of(report, "lora", LAYERS)["extrapolated_from"]


def save_base_of_zeros(tree: dict[str, Any], folder: str) -> None:
    """A model whose logits are all zero: its loss is log V, whatever the tokens."""
    config = parse_config(tree)
    build_mesh(layout_of(config), seed=1)
    shape = resolve_shape(config.model, tokenizer_vocab_size=VOCABULARY)
    chunks = build(shape, choose_method(config.method, num_layers=LAYERS), layout_of(config), BuildOptions())
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.detach().zero_()
    save_model(Path(folder), chunks, shape, {})


def test_a_stored_base_is_measured_whole_and_never_in_slices(pool: Pool, tmp_path: Path) -> None:
    folder = str(tmp_path / "zeros")
    pool.run(1, save_base_of_zeros, tree=make_tree(), folder=folder)
    tree = make_tree(base={"weights": folder})
    out = str(tmp_path / "out")
    assert pool.run(1, bench, tree=tree, out=out, methods=["lora"], steps=1) == [Outcome()]
    whole = report_of(Path(out))
    assert whole["rows"][0]["first_loss"] == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert whole["weights"] == folder
    assert pool.run(1, bench, tree=tree, out=out, methods=["lora"], steps=1, layers=1) == [Outcome()]
    assert report_of(Path(out))["rows"][0]["first_loss"] != pytest.approx(math.log(VOCABULARY), rel=1e-6)
    (refused,) = pool.run(1, bench, tree=make_tree(base={"weights": folder}, model={"hidden_size": 64}), out=out)
    assert refused.status == 4
    assert "hidden_size is 32, not 64" in refused.message


def test_nothing_that_fits_is_one_clear_line(pool: Pool, tmp_path: Path) -> None:
    (outcome,) = pool.run(
        1, bench_with_room, memory=1000, tree=make_tree(), out=str(tmp_path), methods=("lora", "full")
    )
    assert outcome.status == 2
    assert "not one layer of this model fits" in outcome.message


@dataclass
class Lives:
    """Of every model that was built its parameters, and how many of earlier ones were there still at its first step."""

    parameters: list[weakref.ref[Any]] = field(default_factory=list)
    left: list[int] = field(default_factory=list)

    def note(self, trainer: Any) -> None:
        if trainer.step == 0:
            self.left.append(sum(reference() is not None for reference in self.parameters))
            self.parameters.extend(weakref.ref(p) for chunk in trainer.chunks for p in chunk.parameters())


@contextlib.contextmanager
def out_of_memory_in(method: str, lives: Lives) -> Iterator[None]:
    """That method's second step runs out of memory."""

    def step(trainer: Any) -> Any:
        lives.note(trainer)
        if trainer.config.method.name == method and trainer.step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return timed_step(trainer)

    with patch.object(measurement, "timed_step", step):
        yield


def bench_out_of_memory(tree: dict[str, Any], out: str, methods: tuple[str, ...]) -> tuple[Outcome, list[int]]:
    """How it ended, and for every model built how many parameters of earlier ones it found."""
    lives = Lives()
    gc.disable()  # what goes must be given back on purpose, and not by chance
    try:
        outcome = bench(tree, out, methods=methods, under=lambda: out_of_memory_in("full", lives))
    finally:
        gc.enable()
    return outcome, lives.left


def test_a_method_that_does_not_fit_loses_no_others_numbers(pool: Pool, tmp_path: Path) -> None:
    ((outcome, left),) = pool.run(1, bench_out_of_memory, tree=make_tree(), out=str(tmp_path), methods=("full", "lora"))
    assert outcome == Outcome()
    assert left == [0, 0, 0]  # neither a traceback nor a schedule holds a model that was given up
    report = report_of(tmp_path)
    assert report["complete"]
    row = row_of(report, "full", LAYERS)
    assert row["out_of_memory"].startswith("out of memory; plan: ")
    assert row["planned_peak_bytes"] > 0
    assert row["step_seconds"] is None
    assert row_of(report, "lora", LAYERS)["steps"] == 2
    assert report["ratios"] == []
    assert row["out_of_memory"] in (tmp_path / "report.md").read_text()
    assert "MiB" in row["out_of_memory"] or "KiB" in row["out_of_memory"]


def test_nothing_measured_for_want_of_memory_is_an_error(pool: Pool, tmp_path: Path) -> None:
    ((outcome, _),) = pool.run(1, bench_out_of_memory, tree=make_tree(), out=str(tmp_path), methods=("full",))
    assert outcome.status == 2
    assert outcome.message.startswith("nothing could be measured: full, 4 layers: out of memory; plan: ")
    assert "--layers" in outcome.message


def test_out_of_memory_among_several_ranks_keeps_what_was_measured(pool: Pool, tmp_path: Path) -> None:
    """One rank's failure leaves the others waiting, so the bench ends; the report of what was measured stands."""
    tree = make_tree(parallel={"tensor": 2})
    results = pool.run(2, bench_out_of_memory, tree=tree, out=str(tmp_path), methods=("lora", "full"))
    assert {outcome.status for outcome, _ in results} == {2}
    assert all("full, 4 layers: out of memory" in outcome.message for outcome, _ in results)
    report = report_of(tmp_path)
    assert not report["complete"]
    assert [row["method"] for row in report["rows"]] == ["lora"]
    assert "Not complete" in (tmp_path / "report.md").read_text()
    assert names_in(tmp_path) == ["config.yaml", "environment.json", "report.json", "report.md"]


def test_every_model_is_freed(pool: Pool, tmp_path: Path) -> None:
    ((outcome, left),) = pool.run(
        1, bench_out_of_memory, tree=make_tree(), out=str(tmp_path), methods=("lora", "bitfit")
    )
    assert outcome == Outcome()
    assert left == [0] * 4

# SPDX-License-Identifier: Apache-2.0
"""A whole bench on one process and on several: numbers against counts done by hand, files against each other."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from lora_megatron.bench import measurement, plans
from lora_megatron.bench.measurement import Case
from lora_megatron.bench.timing import StepSeconds, timed_step
from lora_megatron.config import parse_config
from lora_megatron.measure.memory import weight_bytes
from lora_megatron.methods.choose import choose_method
from lora_megatron.model.build import BuildOptions, build
from lora_megatron.model.checks import layout_of
from lora_megatron.model.presets import resolve_shape
from lora_megatron.parallel.groups import build_mesh
from tests.bench.benches import BATCH, HIDDEN, LAYERS, LENGTH, PADDED, VOCABULARY, bench, make_tree, report_of, row_of
from tests.commands.runs import Outcome, names_in
from tests.pool import Pool

FLOAT, RANKS_OF_ADAPTERS = 4, 2 + 3
FILES = ["bench.png", "config.yaml", "environment.json", "report.html", "report.json", "report.md"]
LINEAR = 12 * HIDDEN**2  # weights of the linear layers of one layer


def parameters(layers: int, *, vocabulary: int) -> int:
    """Of the base: per layer the linear weights, their 9 h biases and two norms; embeddings and the last norm."""
    return layers * (LINEAR + 9 * HIDDEN + 4 * HIDDEN) + (vocabulary + LENGTH) * HIDDEN + 2 * HIDDEN


def adapter_parameters(layers: int) -> int:
    return layers * RANKS_OF_ADAPTERS * 2 * HIDDEN


def full_flops(layers: int) -> int:
    """Model FLOPs of a step: 6 per linear weight and token, and attention, 4 h per key seen, three times."""
    keys = (LENGTH + 1) / 2
    return int(BATCH * LENGTH * (layers * (6 * LINEAR + 3 * 4 * keys * HIDDEN) + 6 * HIDDEN * VOCABULARY))


def lora_flops(layers: int) -> int:
    """4 per frozen weight and token, no dgrad into the lowest layer's qkv; 6 per adapter's weight, likewise."""
    keys, into_qkv, adapters = (LENGTH + 1) / 2, 2 * 3 * HIDDEN**2, RANKS_OF_ADAPTERS * 2 * HIDDEN
    per_layer = 4 * LINEAR + 3 * 4 * keys * HIDDEN + 6 * adapters
    lowest = into_qkv + 2 * RANKS_OF_ADAPTERS * HIDDEN
    return int(BATCH * LENGTH * (layers * per_layer - lowest + 4 * HIDDEN * VOCABULARY))


@pytest.fixture(scope="module")
def whole(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bench of the whole model on one process."""
    out = tmp_path_factory.mktemp("whole") / "bench"
    assert pool.run(1, bench, tree=make_tree(), out=str(out), steps=3, picture=True) == [Outcome()]
    return out


def test_parameters_and_memory_are_those_counted_by_hand(whole: Path) -> None:
    report = report_of(whole)
    in_memory = parameters(LAYERS, vocabulary=PADDED) * FLOAT
    for method, trained, extra in (
        ("lora", adapter_parameters(LAYERS), adapter_parameters(LAYERS)),
        ("full", parameters(LAYERS, vocabulary=VOCABULARY), 0),
    ):
        row = row_of(report, method, LAYERS)
        assert row["trainable_parameters"] == trained
        assert row["total_parameters"] == parameters(LAYERS, vocabulary=VOCABULARY) + extra
        (memory,) = row["memory_by_rank"]
        held = (extra if method == "lora" else parameters(LAYERS, vocabulary=PADDED)) * FLOAT
        assert memory["weights"] == in_memory + extra * FLOAT
        assert memory["trained"] == memory["gradients"] == held
        assert memory["optimizer"] == 2 * held
        kinds = [memory[kind] for kind in ("weights", "gradients", "optimizer", "activations")]
        assert memory["peak"] == memory["reserved"] == row["peak_bytes"] == sum(kinds)
        assert memory["activations"] > BATCH * LENGTH * HIDDEN * FLOAT / 4
        exact = dict.fromkeys(("weights", "trained", "gradients", "optimizer"), 0.0)
        assert {kind: row["plan_error"][kind] for kind in exact} == exact
        assert abs(row["plan_error"]["activations"]) < 0.05


def test_rates_are_counts_over_the_median_step(whole: Path) -> None:
    report = report_of(whole)
    for method, flops in (("lora", lora_flops(LAYERS)), ("full", full_flops(LAYERS))):
        row = row_of(report, method, LAYERS)
        median = row["step_seconds"]["median"]
        assert row["steps"] == len(row["seconds_of_steps"]) == 3
        assert min(row["seconds_of_steps"]) <= median <= max(row["seconds_of_steps"])
        assert len(row["median_of_each_visit"]) == 2
        assert row["model_flops"] == pytest.approx(flops, rel=1e-12)
        assert row["hardware_flops"] > row["model_flops"]
        assert row["model_flops_per_second_per_rank"] == pytest.approx(flops / median)
        assert row["tokens_per_second_per_rank"] == pytest.approx(BATCH * LENGTH / median)
        achieved = row["hardware_flops"] / median
        assert row["share_of_ceiling"] == pytest.approx(achieved / row["ceiling_flops_per_second"])
        assert 0 < row["optimizer_seconds"]["median"] < row["forward_backward_seconds"]["median"] < median
        assert row["first_loss"] == pytest.approx(4.6, abs=0.3)  # log 100: random weights know nothing
    (ratio,) = report["ratios"]
    medians = [row_of(report, method, LAYERS)["step_seconds"]["median"] for method in ("full", "lora")]
    assert ratio["speed"] == pytest.approx(medians[0] / medians[1])
    assert (ratio["method"], ratio["to"], ratio["extrapolated"]) == ("lora", "full", False)


def test_the_files_agree(whole: Path) -> None:
    assert names_in(whole) == FILES
    report = report_of(whole)
    assert report["complete"]
    assert report["environment"]["packages"]["torch"] == torch.__version__
    text, page = (whole / "report.md").read_text(), (whole / "report.html").read_text()
    for row in report["rows"]:
        for shown in (f"{row['tokens_per_second_per_rank']:,.0f}", f"{row['trainable_parameters']:,}"):
            assert shown in text
            assert shown in page
    assert (whole / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "optimizer" in text
    assert {product["kind"] for product in report["gemm"]["after"]} == {"forward", "dgrad", "wgrad"}
    assert {product["linear"] for product in report["gemm"]["before"]} == {"qkv", "proj", "fc1", "fc2", "output"}


def test_an_earlier_bench_is_replaced(pool: Pool, whole: Path, tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    assert pool.run(1, bench, tree=make_tree(), out=str(tmp_path), methods=["bitfit"], steps=1) == [Outcome()]
    report = report_of(tmp_path)
    assert [row["method"] for row in report["rows"]] == ["bitfit"]
    assert report["rows"][0]["trainable_parameters"] == LAYERS * (9 + 2) * HIDDEN + HIDDEN
    assert report["ratios"] == []


def weights_of_rank(tree: dict[str, Any], method: str, layers: int) -> int:
    """Bytes of a model that this test builds itself."""
    config = parse_config(tree)
    build_mesh(layout_of(config), seed=1)
    shape = resolve_shape(config.model.model_copy(update={"num_layers": layers}), tokenizer_vocab_size=VOCABULARY)
    chosen = choose_method(config.method.model_copy(update={"name": method}), num_layers=layers)
    return weight_bytes(build(shape, chosen, layout_of(config), BuildOptions()))


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [({"tensor": 2, "sequence": True}, (1, 2)), ({"pipeline": 2}, None), ({}, (1, 2))],
    ids=["tp2-sp", "pp2", "dp2"],
)
def test_two_ranks(pool: Pool, tmp_path: Path, layout: dict[str, Any], sizes: tuple[int, int] | None) -> None:
    """Slices under tensor and data parallelism; under PP=2 a slice of two layers has no smaller one."""
    tree = make_tree(parallel=layout)
    assert pool.run(2, bench, tree=tree, out=str(tmp_path / "out"), layers=2) == [Outcome()] * 2
    report = report_of(tmp_path / "out")
    assert report["world_size"] == 2
    for method in ("lora", "full"):
        own = pool.run(2, weights_of_rank, tree=tree, method=method, layers=2)
        row = row_of(report, method, 2)
        assert [rank["weights"] for rank in row["memory_by_rank"]] == own
        assert row["tokens_per_second_per_rank"] == pytest.approx(BATCH * LENGTH / row["step_seconds"]["median"] / 2)
        assert [rank["peak"] for rank in row["planned_by_rank"]] == pytest.approx(
            [rank["peak"] for rank in row["memory_by_rank"]], rel=0.05
        )
        expected = {*(sizes or (2,)), *([LAYERS] if sizes and _slower(report, method) else [])}
        assert {r["layers"] for r in report["rows"] if r["method"] == method} == expected


def _slower(report: dict[str, Any], method: str) -> bool:
    """Whether the larger slice took longer, which on a busy machine nobody can promise."""
    first, second = (row_of(report, method, n)["step_seconds"]["median"] for n in (1, 2))
    return bool(second > first)


def test_a_slice_must_fill_the_pipeline(pool: Pool, tmp_path: Path) -> None:
    tree = make_tree(parallel={"pipeline": 2})
    outcomes = pool.run(2, bench, tree=tree, out=str(tmp_path / "out"), layers=3)
    assert len(set(outcomes)) == 1
    assert outcomes[0].status == 2
    assert "multiple of parallel.pipeline x virtual_pipeline = 2" in outcomes[0].message


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
    assert row_of(report, "full", 12)["total_parameters"] == parameters(12, vocabulary=VOCABULARY)
    assert [row["layers"] for row in report["headline"]] == [12, 12]
    text = (tmp_path / "report.md").read_text()
    assert "12 layers (from 2 and 4)" in text
    assert "the first 2 and 4 of 12 layers were measured" in text


@contextlib.contextmanager
def room_for(memory: int) -> Iterator[None]:
    with patch.object(plans, "free_bytes", lambda: memory), planted_law():
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
    memory = int(room / 0.92)
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
    memory = int(room / 0.92)
    outcome = pool.run(1, bench_with_room, memory=memory, tree=tree, out=str(tmp_path), methods=("lora", "full"))
    assert outcome == [Outcome()]
    report = report_of(tmp_path)
    measured = {(row["method"], row["layers"]) for row in report["rows"] if not row["extrapolated_from"]}
    assert ("full", 1) in measured
    assert len([layers for method, layers in measured if method == "lora"]) == 2
    assert row_of(report, "lora", LAYERS)["extrapolated_from"]


def test_nothing_that_fits_is_one_clear_line(pool: Pool, tmp_path: Path) -> None:
    (outcome,) = pool.run(
        1, bench_with_room, memory=1000, tree=make_tree(), out=str(tmp_path), methods=("lora", "full")
    )
    assert outcome.status == 2
    assert "not one layer of this model fits" in outcome.message


@contextlib.contextmanager
def out_of_memory_in(method: str, kept: list[weakref.ref[Any]]) -> Iterator[None]:
    """That method's second step runs out of memory."""

    def step(trainer: Any) -> Any:
        kept.extend(weakref.ref(p) for chunk in trainer.chunks for p in chunk.parameters())
        if trainer.config.method.name == method and trainer.step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return timed_step(trainer)

    with patch.object(measurement, "timed_step", step):
        yield


def bench_out_of_memory(tree: dict[str, Any], out: str, methods: tuple[str, ...]) -> tuple[Outcome, int, int]:
    """How it ended, how many parameters were built, and how many of them are still there."""
    kept: list[weakref.ref[Any]] = []
    outcome = bench(tree, out, methods=methods, under=lambda: out_of_memory_in("full", kept))
    gc.collect()
    return outcome, len(kept), sum(reference() is not None for reference in kept)


def test_a_method_that_does_not_fit_loses_no_others_numbers(pool: Pool, tmp_path: Path) -> None:
    ((outcome, built, left),) = pool.run(
        1, bench_out_of_memory, tree=make_tree(), out=str(tmp_path), methods=("full", "lora")
    )
    assert outcome == Outcome()
    assert built > 0 == left  # neither a traceback nor a schedule holds a model that was given up
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
    ((outcome, _, left),) = pool.run(1, bench_out_of_memory, tree=make_tree(), out=str(tmp_path), methods=("full",))
    assert outcome.status == 2
    assert outcome.message.startswith("nothing could be measured: full, 4 layers: out of memory; plan: ")
    assert "--layers" in outcome.message
    assert left == 0


def test_out_of_memory_among_several_ranks_keeps_what_was_measured(pool: Pool, tmp_path: Path) -> None:
    """One rank's failure leaves the others waiting, so the bench ends; the report of what was measured stands."""
    tree = make_tree(parallel={"tensor": 2})
    results = pool.run(2, bench_out_of_memory, tree=tree, out=str(tmp_path), methods=("lora", "full"))
    assert {outcome.status for outcome, _, _ in results} == {2}
    assert all("full, 4 layers: out of memory" in outcome.message for outcome, _, _ in results)
    report = report_of(tmp_path)
    assert not report["complete"]
    assert [row["method"] for row in report["rows"]] == ["lora"]
    assert "Not complete" in (tmp_path / "report.md").read_text()
    assert names_in(tmp_path) == ["config.yaml", "environment.json", "report.json", "report.md"]


def test_every_model_is_freed(pool: Pool, tmp_path: Path) -> None:
    ((outcome, built, left),) = pool.run(
        1, bench_out_of_memory, tree=make_tree(), out=str(tmp_path), methods=("lora", "bitfit")
    )
    assert outcome == Outcome()
    assert built > 0 == left

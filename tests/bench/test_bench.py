# SPDX-License-Identifier: Apache-2.0
"""A whole bench on one process and on several: numbers against counts done by hand, files against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_megatron.config import parse_config
from lora_megatron.measure.memory import weight_bytes
from lora_megatron.methods.choose import choose_method
from lora_megatron.model.build import BuildOptions, build
from lora_megatron.model.checks import layout_of
from lora_megatron.model.presets import resolve_shape
from lora_megatron.parallel.groups import build_mesh
from tests.bench.benches import (
    BATCH,
    HIDDEN,
    LAYERS,
    LENGTH,
    LINEAR,
    PADDED,
    VOCABULARY,
    base_parameters,
    bench,
    make_tree,
    report_of,
    row_of,
)
from tests.commands.runs import Outcome, names_in
from tests.pool import Pool

FLOAT, RANKS_OF_ADAPTERS = 4, 2 + 3
FILES = ["bench.png", "config.yaml", "environment.json", "report.html", "report.json", "report.md"]


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
    in_memory = base_parameters(LAYERS, vocabulary=PADDED) * FLOAT
    for method, trained, extra in (
        ("lora", adapter_parameters(LAYERS), adapter_parameters(LAYERS)),
        ("full", base_parameters(LAYERS, vocabulary=VOCABULARY), 0),
    ):
        row = row_of(report, method, LAYERS)
        assert row["trainable_parameters"] == trained
        assert row["total_parameters"] == base_parameters(LAYERS, vocabulary=VOCABULARY) + extra
        (memory,) = row["memory_by_rank"]
        held = (extra if method == "lora" else base_parameters(LAYERS, vocabulary=PADDED)) * FLOAT
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


def test_products_in_fp8_have_no_ceiling_in_another_precision(pool: Pool, tmp_path: Path) -> None:
    tree = make_tree(base={"storage": "fp8"})
    assert pool.run(1, bench, tree=tree, out=str(tmp_path), steps=1, visits=1) == [Outcome()]
    report = report_of(tmp_path)
    shares = {method: row_of(report, method, LAYERS)["share_of_ceiling"] for method in ("lora", "full")}
    assert shares["lora"] is None
    assert shares["full"] > 0, "nothing of it is frozen"
    assert "no ceiling for lora" in (tmp_path / "report.md").read_text(encoding="utf-8")


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


def test_one_visit_and_what_is_recomputed(pool: Pool, tmp_path: Path) -> None:
    tree = make_tree(train={"recompute": "full", "recompute_layers": 3})
    assert pool.run(1, bench, tree=tree, out=str(tmp_path), methods=["lora"], steps=3, visits=1) == [Outcome()]
    report, text = report_of(tmp_path), (tmp_path / "report.md").read_text(encoding="utf-8")
    row = row_of(report, "lora", LAYERS)
    assert (row["steps"], len(row["median_of_each_visit"]), row["recompute"]) == (3, 1, "full, 3 a chunk")
    assert abs(row["plan_error"]["activations"]) < 0.002
    assert "its one visit" in text
    assert "full, 3 a chunk" in text


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
    assert (
        "same number of layers, so choose a multiple of parallel.pipeline x virtual_pipeline = 2" in outcomes[0].message
    )

# SPDX-License-Identifier: Apache-2.0
"""launch/one_host.py without a process: its layouts, their micro-batches, the budget, the report, bad input."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest

from launch.one_host import run_parts
from launch.one_host_report import GIB, Facts, lines_of, values_of
from launch.one_host_rows import CONFIG, choose_micro_batch, choose_slice, chunks_of, rows_for
from launch.one_host_session import Part, part_names
from lora_megatron.config import load_config
from lora_megatron.errors import ConfigError
from lora_megatron.model.checks import layout_of
from lora_megatron.parallel.groups import check_world_size

TINY = ["model.preset=tiny", "model.num_layers=8", "model.vocab_size=300", "data.sequence_length=32"]
H200 = 139.8 * GIB
EIGHT = ["bf16-tp8", "fp8-tp8", "full", "bf16-tp4-pp2", "fp8-tp2-dp4", "bf16-pp8"]


def test_the_layouts_of_the_issue_on_eight_gpus_and_what_is_left_of_them_on_fewer() -> None:
    assert [row.name for row in rows_for(8, 96)] == EIGHT
    assert [row.name for row in rows_for(4, 96)] == [
        "bf16-tp4",
        "fp8-tp4",
        "full",
        "bf16-tp2-pp2",
        "fp8-tp2-dp2",
        "bf16-pp4",
    ]
    assert [row.name for row in rows_for(2, 96)] == ["bf16-tp2", "fp8-tp2", "full", "bf16-pp2"]
    assert part_names(8, 96) == [*EIGHT, "adapter", "resume"]
    sizes = {row.name: (row.tensor, row.pipeline, row.virtual, row.storage) for row in rows_for(8, 96)}
    assert sizes["bf16-tp4-pp2"] == (4, 2, 12, None)
    assert sizes["bf16-pp8"] == (1, 8, 12, None)
    assert sizes["fp8-tp2-dp4"] == (2, 1, 1, "fp8")
    goals = {row.name: row.goals for row in rows_for(8, 96) if row.goals}
    assert goals == {
        "bf16-tp8": {"speed": 800},
        "fp8-tp8": {"speed": 1300},
        "fp8-tp2-dp4": {"speed": 1300},
        "full": {"ratio": 1.45},
    }


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_every_row_is_a_configuration_that_uses_all_gpus_and_recomputes_nothing(gpus: int) -> None:
    for row in rows_for(gpus, 96):
        config = load_config(CONFIG, row.overrides(gpus, 2))
        check_world_size(layout_of(config), gpus)
        data = gpus // layout_of(config).model_size
        assert config.data.global_batch_size == 2 * data * row.microbatches
        assert config.train.recompute == "none"
        assert row.microbatches % row.pipeline == 0, "the interleaved schedule needs it"
        assert (config.base.storage, config.method.targets) == (row.storage, {"q": 4, "v": 4})


def test_chunks_divide_a_stage() -> None:
    assert [chunks_of(layers, stages) for layers, stages in ((96, 8), (96, 2), (8, 4), (26, 2))] == [12, 12, 2, 1]
    with pytest.raises(ConfigError, match="10 layers do not divide among the 4 stages"):
        chunks_of(10, 4)


def test_the_micro_batch_is_the_largest_that_the_plan_fits() -> None:
    def chosen(name: str, gpus: int, *, memory: float = H200, most: int = 8) -> tuple[int, bool]:
        (row,) = [row for row in rows_for(gpus, 96) if row.name == name]
        choice = choose_micro_batch(row, CONFIG, [], gpus=gpus, memory=memory, most=most)
        assert choice.fits == (choice.planned_bytes <= (0.97 if choice.micro_batch == 1 else 0.94) * memory)
        return choice.micro_batch, choice.fits

    assert chosen("bf16-tp8", 8) == (8, True)
    assert chosen("bf16-tp8", 8, most=3) == (2, True)
    assert chosen("bf16-tp8", 8, memory=80 * GIB) == (4, True)
    assert chosen("bf16-tp4", 4) == (4, True)
    assert chosen("fp8-tp4", 4) == (4, True), "8 would leave 4% of the memory"
    assert chosen("bf16-pp4", 4) == (1, True), "which one sequence may"
    assert chosen("bf16-pp8", 8) == (1, True)
    assert chosen("bf16-tp2", 2) == (1, False)


def test_the_slice_beside_full_fine_tuning_is_the_largest_that_the_plan_fits() -> None:
    def chosen(name: str, overrides: Sequence[str] = (), *, memory: float = H200, micro_batch: int = 4) -> int | None:
        (row,) = [row for row in rows_for(8, 96) if row.name == name]
        return choose_slice(row, CONFIG, overrides, gpus=8, micro_batch=micro_batch, memory=memory)

    assert chosen("full") == 27, "28 would leave 5% of the memory"
    assert chosen("full", memory=80 * GIB) == 15
    assert chosen("full", memory=4 * GIB) is None, "not one layer: the bench says so"
    assert chosen("full", [*TINY, "model.num_attention_heads=8"]) == 8, "all of them"
    assert chosen("bf16-tp8") is None, "the whole model"


def part(name: str, seconds: float, outcome: str = "") -> tuple[Part, list[float]]:
    """A part of planned seconds that ends with `outcome`, and the limits it was given."""
    limits: list[float] = []
    result = {"part": name, "what": name, "planned_seconds": seconds, "seconds": None, "state": "to come", "why": ""}

    def run(limit: float) -> str:
        limits.append(limit)
        return outcome

    return Part(result, run), limits


def test_what_does_not_fit_the_budget_is_left_out_and_what_fails_does_not_end_the_session() -> None:
    (first, given), (broken, _), (long, never), (last, late) = (
        part("first", 30.0),
        part("broken", 30.0, "ended with status 2: error: no"),
        part("long", 90.0),
        part("last", 40.0),
    )
    lefts, written = iter([100.0, 70.0, 60.0, 50.0]), []
    run_parts([first, broken, long, last], lambda: next(lefts), written.append)
    states = [(p.result["state"], p.result["why"]) for p in (first, broken, long, last)]
    assert states == [
        ("done", ""),
        ("failed", "ended with status 2: error: no"),
        ("skipped", "90 s are planned and 60 s of --budget left"),
        ("done", ""),
    ]
    assert (given, never, late) == ([60.0], [], [50.0]), "twice what is planned, within what is left"
    assert long.result["seconds"] is None
    assert written == [False, False, False, True], "after each part"


def row(method: str, layers: int, speed: float, **more: Any) -> dict[str, Any]:
    """As `bench.results` makes it."""
    kinds = {"weights": 40 * GIB, "activations": 40 * GIB, "peak": 80 * GIB}
    return {
        "method": method,
        "layers": layers,
        "extrapolated_from": None,
        "out_of_memory": None,
        "tokens_per_second_per_rank": speed,
        "step_seconds": {"median": 2.5, "p10": 2.4, "p90": 2.6, "low": 2.4, "high": 2.6},
        "peak_bytes": 80 * GIB,
        "planned_peak_bytes": 81 * GIB,
        "memory_by_rank": [{"rank": 0, **kinds, "reserved": 90 * GIB}],
        "planned_by_rank": [{"rank": 0, **kinds, "peak": 81 * GIB}],
        **more,
    }


def facts(
    name: str, *, rows: list[Any], ratios: Sequence[Any] = (), goals: dict[str, float], **more: Any
) -> dict[str, Any]:
    found = {
        "part": name,
        "what": name.upper(),
        "planned_seconds": 60.0,
        "seconds": 50.0,
        "state": "done",
        "why": "",
        "command": f"lora-megatron bench {name}",
        "goals": goals,
        "rows": rows,
        "ratios": list(ratios),
        "data": {"micro_batch_size": 8, "global_batch_size": 8},
        **more,
    }
    return {**found, "values": values_of(found, goals)}


SHARES = [
    {"rank": 0, "share": 0.3, "exposed_share": 0.2, "idle_share": 0.05, "by_collective": {"all-gather": 0.3}},
    {"rank": 1, "share": 0.35, "exposed_share": 0.2, "idle_share": 0.04, "by_collective": {"all-gather": 0.35}},
]
SCALED = {"extrapolated_from": [13, 27], "memory_by_rank": None}
RATIOS = [
    {"layers": 27, "extrapolated": False, "speed": 1.5},
    {"layers": 96, "extrapolated": True, "speed": 1.44},
]
PARTS = [
    facts("tp", rows=[row("lora", 96, 812.0, communication=SHARES)], goals={"speed": 800}),
    facts("fp8", rows=[row("lora", 96, 1250.0, communication=[])], goals={"speed": 1300}),
    facts(
        "full", rows=[row("full", 27, 500.0), row("lora", 96, 790.0, **SCALED)], ratios=RATIOS, goals={"ratio": 1.45}
    ),
    facts("pp", rows=[], goals={"speed": 1300}, state="failed", why="a rank was lost"),
]
REPORT: Facts = {
    "complete": True,
    "command": "python launch/one_host.py",
    "processes": 8,
    "shape": {"num_layers": 96, "hidden_size": 12288},
    "is_the_goals_setting": True,
    "environment": {
        "devices": {"gpus": [{"name": "NVIDIA H200"}] * 8},
        "python": "3.12",
        "packages": {"torch": "2.11"},
        "git": None,
    },
    "variables": {"NCCL_NVLS_ENABLE": "0"},
    "parts": PARTS,
}


def cells(lines: list[str], start: str) -> list[str]:
    """Of the first table row whose first cell is `start`."""
    (line, *_) = [line for line in lines if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_a_report_tells_speeds_goals_shares_and_what_is_missing() -> None:
    lines = lines_of(REPORT)
    assert cells(lines, "TP")[2:] == [
        "812", "2.50 s", "2.40 s to 2.60 s", "80.0 GiB", "81.0 GiB", "30.0% to 35.0%", "20.0%",
    ]  # fmt: skip
    assert cells(lines, "FP8")[-2:] == ["not measured", "not measured"]
    assert cells(lines, "FULL")[0] == "96 layers (from 13 and 27)"
    assert cells(lines, "PP")[0] == "a rank was lost"
    assert cells(lines, "TP: tokens/s per GPU, 96 layers") == ["812", "\\>= 800", "met"]
    assert cells(lines, "FP8: tokens/s per GPU, 96 layers") == ["1,250", "\\>= 1,300", "missed"]
    assert cells(lines, "LoRA over full fine-tuning, slices scaled to 96 layers") == ["1.44", "\\>= 1.45", "missed"]
    assert "not measured: a rank was lost" in next(line for line in lines if line.startswith("| PP | - |"))
    assert cells(lines, "TP: all-gather") == ["30.0% to 35.0%"]
    assert cells(lines, "TP: nothing ran") == ["4.0% to 5.0%"]
    assert cells(lines, "TP: lora, 96 layers") == ["0", "40 / 40", "40 / 40", "80 / 81", "90"]
    text = "\n".join(lines)
    assert "8 x NVIDIA H200, Python 3.12, torch 2.11." in text
    assert "NCCL\\_NVLS\\_ENABLE=0" in text
    assert "27 layers: 1.500x; 96 layers, extrapolated: 1.440x" in text
    assert "full: lora-megatron bench full" in lines
    assert "Not complete" not in text


def test_goals_are_not_judged_in_another_setting_and_an_unfinished_report_says_so() -> None:
    report = copy.deepcopy({**REPORT, "is_the_goals_setting": False, "complete": False})
    lines = lines_of(report)
    assert cells(lines, "TP: tokens/s per GPU, 96 layers")[-1] == "another setting"
    assert any("Not complete" in line for line in lines)


def test_a_method_without_memory_has_no_value() -> None:
    gone = row("lora", 96, 0.0, out_of_memory="not tried, out of memory by the plan")
    assert values_of({"what": "x", "rows": [gone], "ratios": []}, {"speed": 800, "ratio": 1.45}) == []

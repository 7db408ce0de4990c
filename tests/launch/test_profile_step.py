# SPDX-License-Identifier: Apache-2.0
"""launch/profile_step.py on a CPU, where torch's operations stand for kernels: its report, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import profile_step
from launch.profile_step import Profile
from lora_megatron.bench.communication import Kernel
from lora_megatron.measure.markdown import escape
from tests.bench.benches import LAYERS, make_tree
from tests.pool import Pool

SECOND = 10**9
REDUCE = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL"


def run(arguments: list[str]) -> int:
    """In the worker's world, which the script leaves."""
    return profile_step.main(arguments)


def config_in(folder: Path, **sections: dict[str, Any]) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(make_tree(**sections)), encoding="utf-8")
    return str(path)


def test_two_slices_tell_what_a_layer_adds(pool: Pool, tmp_path: Path) -> None:
    """At TP=2; a layer calls attention once a microbatch, and nothing else does."""
    out = tmp_path / "out"
    config = config_in(tmp_path, parallel={"tensor": 2}, train={"recompute": "auto"}, data={"global_batch_size": 2})
    arguments = [config, "--layers", "1,3", "--steps", "1", "--top", "1000", "--out", str(out)]
    assert pool.run(2, run, arguments=arguments) == [0, 0]

    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    small, large = report["slices"]
    assert (report["kind"], report["world_size"], small["layers"], large["layers"]) == ("profile_step", 2, 1, 3)
    for one in (small, large):
        assert 0 < one["busy_seconds"] <= one["watched_step_seconds"]
        assert one["exposed_communication_seconds"] == 0  # gloo's ranges are no kernels
        assert report["median_step_seconds"][str(one["layers"])] == one["step_seconds"]["median"] > 0

    def launches(one: dict[str, Any], name: str) -> float:
        return sum(kernel["launches"] for kernel in one["kernels"] if kernel["name"] == name)

    attention = "aten::scaled_dot_product_attention"
    microbatches = 2  # of one sample
    assert [launches(one, attention) for one in (small, large)] == [microbatches, 3 * microbatches]
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "## One more layer" in text
    assert f"| {escape(attention)} | attention | {microbatches:.1f} |" in text


def test_one_slice_is_told_as_a_step(pool: Pool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [config_in(tmp_path), "data.global_batch_size=1", "--layers", "2", "--steps", "1", "--out", str(out)]
    assert pool.run(1, run, arguments=arguments) == [0]
    assert "## A step of 2 layers" in (out / "report.md").read_text(encoding="utf-8")


def test_times_of_a_profile_are_of_one_step() -> None:
    """Two steps in ten seconds: GEMM 0 to 4 and 6 to 7, all-reduce 3 to 6, so alone from 4 to 6; nothing after 7."""
    spans = [("gemm", 0, 4), (REDUCE, 3, 6), ("gemm", 6, 7)]
    kernels = [Kernel(name, (start * SECOND, stop * SECOND)) for name, start, stop in spans]
    found = Profile(1, [4.0], kernels, steps=2, watched_seconds=10.0).to_dict()
    assert found["busy_seconds"] == pytest.approx(3.5)
    assert found["exposed_communication_seconds"] == pytest.approx(1.0)
    assert found["watched_step_seconds"] == pytest.approx(5.0)
    assert [(one["kind"], one["launches"], one["seconds"]) for one in found["kernels"]] == [
        ("products", 1.0, pytest.approx(2.5)),
        ("communication", 0.5, pytest.approx(1.5)),
    ]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--layers", "0"], "--layers '0': give one number of layers, or two"),
        (["--layers", "1,x"], "--layers '1,x': give one number of layers, or two"),
        (["--layers", "9"], f"--layers 9: the model has {LAYERS}"),
        (["--layers", "1,9"], f"--layers 9: the model has {LAYERS}"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--top", "-1"], "--top -1: must be at least 1"),
        (["--method", "lara"], "unknown method.name 'lara': did you mean lora?"),
        (["model.vocab_size=null"], "model.vocab_size is not set"),
        (["model.vocab_sise=8"], "unknown key model.vocab_sise: did you mean model.vocab_size?"),
        (["parallel.tensor=2"], "parallel.tensor"),
        (
            ["train.recompute=full", "train.recompute_unit=2"],
            "recompute_unit = 2: a model chunk of this layout has 1 layer; leave",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    wrong: list[str], says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert profile_step.main([config_in(tmp_path), *wrong, "--out", str(out)]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("there", ["a file", "a stranger's folder"])
def test_what_is_not_its_own_is_left_alone(there: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    if there == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert profile_step.main([config := config_in(tmp_path), "--layers", "1", "--out", str(out)]) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: --out {out} ")
    assert error.count("\n") == 1
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file() and str(path) != config} == before


def test_a_configuration_that_is_not_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert profile_step.main([str(tmp_path / "none.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert capfd.readouterr().err.count("\n") == 1

# SPDX-License-Identifier: Apache-2.0
"""launch/bench_peft.py and launch/adapter_tax.py at sizes for a CPU: what they count, compare and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from launch import adapter_tax, bench_peft
from launch.adapter_tax_cases import Case as TaxCase
from launch.adapter_tax_cases import config_of, shape_of
from launch.rival_models import PRECISION, RivalTrainer, Sizes, build_rival
from lora_megatron.bench.measurement import Case, Effort, visit
from lora_megatron.bench.workload import free
from lora_megatron.layers.storage.fp8 import Fp8Products
from lora_megatron.model.checks import layout_of
from lora_megatron.parallel import groups
from tests.pool import Pool

HIDDEN, SEQUENCE, VOCABULARY, BATCH = 64, 16, 100, 2
SMALL = f"--hidden {HIDDEN} --heads 2 --sequence {SEQUENCE} --vocabulary {VOCABULARY} --batch {BATCH} --steps 2".split()
ALL = "bf16,fp8,nf4,nf4-fp8,plain,peft,peft-checkpointing"


def run_here(script: Any, arguments: list[str]) -> int:
    """In the worker's world, which the script leaves; the pool makes a new one for each job."""
    return int(script.main(arguments))


def run_peft(arguments: list[str]) -> int:
    return run_here(bench_peft, arguments)


def run_tax(arguments: list[str]) -> int:
    return run_here(adapter_tax, arguments)


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def peft(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of every case on slices of one and two layers."""
    out = tmp_path_factory.mktemp("peft") / "out"
    arguments = [*SMALL, "--layers", "1,2", "--scale-to", "8", "--cases", ALL, "--rounds", "2", "--out", str(out)]
    assert pool.run(1, run_peft, arguments=arguments) == [0]
    return out


def test_every_case_trains_the_same_number_of_parameters_from_the_same_loss(peft: Path) -> None:
    report = report_of(peft)
    assert report["complete"]
    assert [(row["case"], row["layers"]) for row in report["rows"]] == [
        (name, layers) for layers in (1, 2) for name in ALL.split(",")
    ]
    for row in report["rows"]:
        assert row["trained_parameters"] == row["layers"] * 16 * HIDDEN  # q and v: 2 (4 h + 4 h); c_attn: 4 h + 4 (3 h)
        assert row["first_loss"] == pytest.approx(4.6, abs=0.3)  # log 100: random weights know nothing
        assert [len(visit) for visit in row["seconds_of_steps"]] == [2, 2]
        assert row["tokens_per_second"] == pytest.approx(BATCH * SEQUENCE / row["step_seconds"]["median"])


def test_ratios_are_to_peft_at_the_same_size(peft: Path) -> None:
    rows = {(row["case"], row["layers"]): row for row in report_of(peft)["rows"]}
    for (name, layers), row in rows.items():
        reference = rows["peft", layers]
        assert row["to_peft"]["speed"] == pytest.approx(
            reference["step_seconds"]["median"] / row["step_seconds"]["median"]
        ), name
        assert row["to_peft"]["activations"] == pytest.approx(row["activation_bytes"] / reference["activation_bytes"])
    kept = {name: rows[name, 2]["activation_bytes"] - rows[name, 1]["activation_bytes"] for name in ALL.split(",")}
    assert kept["peft-checkpointing"] < kept["bf16"] == kept["fp8"] < kept["plain"] < kept["peft"]  # of one layer


def test_whole_models_are_extrapolated_and_said_to_be(peft: Path) -> None:
    report, text = report_of(peft), (peft / "report.md").read_text(encoding="utf-8")
    rows = {(row["case"], row["layers"]): row for row in report["rows"]}
    assert [row["case"] for row in report["scaled"]] == ALL.split(",")
    for row in report["scaled"]:
        small, large = (rows[row["case"], layers]["step_seconds"]["median"] for layers in (1, 2))
        assert row["step_seconds"]["median"] == pytest.approx(small + 7 * (large - small))
    assert "8 layers, extrapolated" in text
    assert f"transformers {report['environment']['packages']['transformers']}" in text


SIZES = Sizes(layers=2, hidden=HIDDEN, heads=2, sequence=SEQUENCE, vocabulary=VOCABULARY, rank=4, alpha=16.0)


def rival_gradients(name: str) -> dict[str, torch.Tensor]:
    """Weights and gradients of q's and v's adapters of the last layer, all weights drawn from one seed."""
    torch.manual_seed(0)
    model = build_rival(name, SIZES, activation="gelu_pytorch_tanh")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE + 1), generator=generator)
    RivalTrainer(model, lr=0.0, clip=1e9).step(tokens[:, :-1], tokens[:, 1:], metered=False)
    return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}


def test_rivals_train_adapters_in_bf16_and_nothing_else() -> None:
    for name in bench_peft.RIVALS:
        grads = rival_gradients(name)
        assert len(grads) == SIZES.layers * (4 if name == "plain" else 2)
        assert all("lora_" in key and grad.dtype == PRECISION and grad.any() for key, grad in grads.items())
    plain, checkpointed = rival_gradients("peft"), rival_gradients("peft-checkpointing")
    assert all(torch.equal(grad, checkpointed[key]) for key, grad in plain.items())


def test_a_rival_learns() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE + 1))
    for name in bench_peft.RIVALS:
        trainer = RivalTrainer(build_rival(name, SIZES, activation="gelu_new"), lr=0.05, clip=1.0)
        losses = [trainer.step(tokens[:, :-1], tokens[:, 1:], metered=False) for _ in range(15)]
        assert losses[-1] < losses[0] - 0.1, name


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param([], id="tp1"),
        pytest.param(["--tensor", "2", "--sequence-parallel"], id="tp2-sp", marks=pytest.mark.slow),
    ],
)
def test_tax_of_slices_layers_and_models(pool: Pool, tmp_path: Path, layout: list[str]) -> None:
    out = tmp_path / "out"
    arguments = [*SMALL, *layout, "--layers", "1,2", "--warm-up", "0", "--rounds", "2", "--out", str(out)]
    world = 2 if layout else 1
    assert pool.run(world, run_tax, arguments=arguments) == [0] * world
    report = report_of(out)
    assert report["complete"]
    assert report["world_size"] == world
    rows = {(row["storage"], row["layers"], row["adapted"]): row for row in report["rows"]}
    assert [tax["part"] for tax in report["taxes"]] == ["whole", "forward_backward"] * 2
    for tax in report["taxes"]:
        storage, part = tax["storage"], "step" if tax["part"] == "whole" else tax["part"]
        medians = {key: row[f"{part}_seconds"]["median_of_each_visit"] for key, row in rows.items()}
        for index in range(2):
            small, large = ([medians[storage, size, adapted][index] for adapted in (True, False)] for size in (1, 2))
            assert tax["slices"]["1"]["rounds"][index] == pytest.approx(small[0] / small[1] - 1)
            if large[1] > small[1] and large[0] > small[0] and len(tax["layer"]["rounds"]) == 2:
                slopes = [large[place] - small[place] for place in (0, 1)]
                assert tax["layer"]["rounds"][index] == pytest.approx(slopes[0] / slopes[1] - 1)
    for (_, layers, adapted), row in rows.items():
        per_layer = 16 * (4 * 2 + 2 * 5) * HIDDEN  # r (in + out): q, k, v and o h + h each, fc1 and fc2 h + 4 h
        assert row["trained_parameters"] == (layers * per_layer if adapted else 2 * HIDDEN)


def dgrads(arguments: list[str], adapted: bool) -> list[tuple[int, int]]:
    """Shapes of the frozen weights that a step of two FP8 layers multiplies gradients with, in order."""
    options = adapter_tax.parse(arguments)
    config = config_of(TaxCase("fp8", 2, adapted), options)
    groups.build_mesh(layout_of(config), seed=1)
    seen: list[tuple[int, int]] = []
    multiply = Fp8Products.backward_product

    def noted(stored: Any, *factors: Any) -> Any:
        seen.append(stored.shape)
        return multiply(stored, *factors)

    with patch.object(Fp8Products, "backward_product", noted):
        visit(
            Case("lora", 2),
            config,
            shape_of(config),
            Effort(1, 3),
            load=None,
            planned_bytes=0,
            on_step=lambda report: None,
        )
    free()
    return seen


def test_the_reference_has_the_same_dgrad(pool: Pool) -> None:
    """Through all four linears of a layer, and of layer 0 all but q, k and v, with adapters and without."""
    arguments = [*SMALL, "--out", "unused"]
    (lora,) = pool.run(1, dgrads, arguments=arguments, adapted=True)
    (reference,) = pool.run(1, dgrads, arguments=arguments, adapted=False)
    proj, fc1, fc2, qkv = (HIDDEN, HIDDEN), (4 * HIDDEN, HIDDEN), (HIDDEN, 4 * HIDDEN), (3 * HIDDEN, HIDDEN)
    assert lora == reference == [fc2, fc1, proj, qkv, fc2, fc1, proj] * (len(lora) // 7)
    assert lora


def test_a_step_has_as_many_microbatches_as_asked_for(pool: Pool, tmp_path: Path) -> None:
    arguments = [*SMALL, "--out", str(tmp_path / "out")]
    three = [*arguments, "--microbatches", "3"]
    (once,) = pool.run(1, dgrads, arguments=arguments, adapted=True)
    assert pool.run(1, dgrads, arguments=three, adapted=True) == [3 * once]
    for given, count in ((arguments, 1), (three, 3)):
        data = config_of(TaxCase("bf16", 1, True), adapter_tax.parse(given)).data
        assert (data.micro_batch_size, data.global_batch_size) == (BATCH, count * BATCH)
    short = ["--layers", "1", "--storage", "bf16", "--warm-up", "0", "--rounds", "1"]
    assert pool.run(1, run_tax, arguments=[*three, *short]) == [0]
    assert report_of(tmp_path / "out")["options"]["microbatches"] == 3
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert f"3 microbatches a step, each of {BATCH} x {SEQUENCE} tokens" in text


@pytest.mark.parametrize(
    ("script", "wrong", "says"),
    [
        (bench_peft, ["--cases", "bf16,lora"], "--cases names 'lora': choose among bf16"),
        (bench_peft, ["--cases", "bf16,bf16"], "--cases names bf16 twice"),
        (bench_peft, ["--layers", "4,4"], "--layers '4,4': give one number"),
        (bench_peft, ["--layers", "2", "--scale-to", "96"], "--scale-to 96 needs two smaller slices"),
        (bench_peft, ["--heads", "5"], "--hidden 64 is not a multiple of --heads 5"),
        (bench_peft, ["--steps", "0"], "--steps 0: must be at least 1"),
        (bench_peft, ["--override", "base.storag=fp8"], "unknown key base.storag: did you mean base.storage?"),
        (adapter_tax, ["--storage", "fp4"], "--storage names 'fp4': choose among bf16, fp8"),
        (adapter_tax, ["--microbatches", "0"], "--microbatches 0: must be at least 1"),
        (adapter_tax, ["--warm-up", "-1"], "--warm-up -1: must be 0 or more"),
    ],
)
def test_wrong_options_are_one_line_and_status_2(
    script: Any, wrong: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([*SMALL, *wrong, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ['{"kind": "bench"}', "[", "[]"])
def test_a_folder_with_other_things_is_left_alone(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.json").write_text(content)
    assert bench_peft.main([*SMALL, "--out", str(tmp_path)]) == 2
    assert "holds report.json, which no bench_peft has written" in capsys.readouterr().err
    assert (tmp_path / "report.json").read_text() == content

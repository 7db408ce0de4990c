# SPDX-License-Identifier: Apache-2.0
"""Cases that stand beside each other and step in turns (`bench.measurement.visit_in_turns`)."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch

from launch import adapter_tax
from launch.adapter_tax_cases import Pair, config_of, shape_of
from lora_megatron.bench import measurement
from lora_megatron.bench.measurement import Case, Effort, Measured, OutOfMemory
from lora_megatron.errors import ConfigError, OutOfMemoryAlone
from lora_megatron.measure.memory import MemoryByKind
from lora_megatron.model.checks import layout_of
from lora_megatron.parallel import groups
from tests.pool import Pool

SMALL = ["--hidden", "64", "--heads", "2", "--sequence", "16", "--vocabulary", "100", "--out", "unused"]
WHOLE = Case("lora", 1)
EFFORT = Effort(steps=5, warm_up=1)


def prepared() -> tuple[list[tuple[Case, Any]], Any]:
    """A slice with adapters and without, and the shape of the model."""
    options = adapter_tax.parse(SMALL)
    configs = [config_of(case, options) for case in Pair("bf16", 1).cases]
    groups.build_mesh(layout_of(configs[0]), seed=1)
    return [(WHOLE, config) for config in configs], shape_of(configs[0])


def in_turns() -> tuple[list[tuple[int, float]], list[tuple[str, int]]]:
    """(measured steps, last loss) of each case, and which of them took its which step, in order."""
    cases, shape = prepared()
    order: list[tuple[str, int]] = []
    step, names = measurement.timed_step, dict[int, str]()

    def noted(trainer: Any) -> Any:
        name = names.setdefault(id(trainer), "ABC"[len(names)])
        order.append((name, trainer.step))
        return step(trainer)

    with patch.object(measurement, "timed_step", noted):
        found = measurement.visit_in_turns(cases, shape, EFFORT, turn=2, planned_bytes=0)
    assert not isinstance(found, OutOfMemory)
    return [(len(each.steps), each.last_loss) for each in found], order


def alone() -> list[tuple[int, float]]:
    cases, shape = prepared()
    found = []
    for case, config in cases:
        measured = measurement.visit(
            case, config, shape, EFFORT, load=None, planned_bytes=0, on_step=lambda report: None
        )
        assert isinstance(measured, Measured)
        found.append((len(measured.steps), measured.last_loss))
    return found


def test_each_steps_as_if_it_were_alone(pool: Pool) -> None:
    ((found, order),) = pool.run(1, in_turns)
    assert found == pool.run(1, alone)[0]
    assert found[0][1] != found[1][1], "two models"
    first = {name: min(index for index, (who, _) in enumerate(order) if who == name) for name in "AB"}
    measured = {name: [step for who, step in order if who == name][-EFFORT.steps :] for name in "AB"}
    turns = "".join(who for who, step in order if step in measured[who])
    assert turns == "AABBBBAAAB", "A B B A A B, the last turn shorter"
    assert first["A"] == 0
    assert first["B"] < len(order) - len(turns), "both have warmed up before"


def out_of_memory() -> str:
    cases, shape = prepared()
    with patch.object(measurement, "build_trainer", side_effect=torch.OutOfMemoryError):
        found = measurement.visit_in_turns(cases, shape, EFFORT, turn=2, planned_bytes=2**30)
    assert isinstance(found, OutOfMemory)
    return found.reason


def test_what_does_not_fit_says_what_was_planned(pool: Pool) -> None:
    assert pool.run(1, out_of_memory) == ["out of memory; plan: 1.00 GiB"]


def told_of_both(*, world: int) -> str:
    options = adapter_tax.parse(SMALL)
    groups.build_mesh(layout_of(config_of(Pair("bf16", 1).cases[0], options)), seed=1)
    found: Any = OutOfMemory(WHOLE, "out of memory")
    with patch.object(measurement, "visit_in_turns", side_effect=OutOfMemoryAlone if world > 1 else [found]):
        try:
            adapter_tax.visit(Pair("bf16", 1), options)
        except (ConfigError, OutOfMemoryAlone) as error:
            return f"{type(error).__name__} {error}"
    return "nothing"


@pytest.mark.parametrize(("world", "kind"), [(1, "ConfigError"), (2, "OutOfMemoryAlone")])
def test_a_user_is_told_that_there_were_two(pool: Pool, world: int, kind: str) -> None:
    (said,) = pool.run(1, told_of_both, world=world)
    assert said.startswith(f"{kind} bf16, 1 layer, with adapters and without beside each other: out of memory; ")
    assert said.endswith("lower --layers or --batch, or raise --tensor")


@pytest.mark.parametrize(("beside", "activations"), [(0, 30), (20, 10), (40, 0)])
def test_memory_is_its_own(beside: int, activations: int) -> None:
    memory = MemoryByKind(weights=5, gradients=1, optimizer=2, activations=30, peak=38 + beside, trained=1, reserved=99)
    own = measurement._without(beside, memory)
    assert (own.weights, own.activations, own.peak) == (5, activations, 38)

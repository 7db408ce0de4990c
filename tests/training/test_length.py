# SPDX-License-Identifier: Apache-2.0
"""How long a run is: epochs to steps, exactly, and which steps end an epoch."""

from __future__ import annotations

import pytest

from lora_megatron.config import parse_config
from lora_megatron.errors import ConfigError
from lora_megatron.training.length import ends_epoch, show_length, total_steps


def steps(epochs: float, rows: int, batch: int) -> int:
    config = parse_config({"train": {"epochs": epochs}, "data": {"global_batch_size": batch}})
    return total_steps(config, rows)


@pytest.mark.parametrize(
    ("epochs", "rows", "batch", "expected"),
    [
        (5, 42_061, 8, 26_289),  # E2E: 26,288.1
        (2, 392_702, 128, 6_136),
        (1, 8, 8, 1),
        (1, 9, 8, 2),
        (0.5, 9, 8, 1),
        (1.1, 50, 1, 55),  # as floats 55.00000000000001
        (1e-9, 3, 8, 1),
    ],
)
def test_epochs_are_rounded_up_to_whole_steps(epochs: float, rows: int, batch: int, expected: int) -> None:
    assert steps(epochs, rows, batch) == expected


def test_more_steps_than_steps_could_be_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.epochs = 1e\+09 are 250,000,000,000 steps over 1,000 rows"):
        steps(1e9, 1000, 4)


def test_given_steps_are_taken_as_they_are() -> None:
    assert total_steps(parse_config({"train": {"steps": 7}}), rows=0) == 7
    assert show_length(parse_config({"train": {"steps": 7}}), rows=9) == ""
    config = parse_config({"train": {"epochs": 2.5}, "data": {"global_batch_size": 4}})
    assert show_length(config, rows=1000) == "train.epochs = 2.5: 625 steps of 4 of 1,000 rows"


@pytest.mark.parametrize(("rows", "batch"), [(18, 4), (7, 8), (16, 4), (5, 16), (1, 1)])
def test_an_epoch_ends_with_the_step_that_takes_its_last_row(rows: int, batch: int) -> None:
    taken = {-(-epoch * rows // batch) for epoch in range(200)}
    assert {step for step in range(40) if ends_epoch(step, rows=rows, batch=batch)} == {s for s in taken if s < 40}

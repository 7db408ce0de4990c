# SPDX-License-Identifier: Apache-2.0
"""How many steps a run has, and where its epochs end: functions of the configuration and the number of rows."""

from __future__ import annotations

import math
from fractions import Fraction

from lora_megatron.config import Config
from lora_megatron.config.sections import LARGEST_COUNT
from lora_megatron.errors import ConfigError


def total_steps(config: Config, rows: int) -> int:
    """`train.steps`, or those that `train.epochs` over `rows` rows take: the last one may reach into the next epoch.

    rows: as they are drawn, that is packed ones with `data.packing`.

    Raises:
        ConfigError: more steps than `train.steps` could be.
    """
    section = config.train
    if section.epochs is None:
        assert section.steps is not None, "one of the two is always set"
        return section.steps
    epochs = Fraction(str(section.epochs))  # as floats 1.1 x 50 is above 55, and ceil would add a step
    steps = math.ceil(epochs * rows / config.data.global_batch_size)
    if steps > LARGEST_COUNT:
        raise ConfigError(
            f"train.epochs = {section.epochs:g} are {steps:,} steps over {rows:,} rows: lower it to at most "
            f"{LARGEST_COUNT:,} steps"
        )
    return steps


def ends_epoch(step: int, *, rows: int, batch: int) -> bool:
    """Whether `step` takes the last row of an epoch; so does 0, which ends the one before the first."""
    return step * batch // rows > (step - 1) * batch // rows


def show_length(config: Config, rows: int) -> str:
    """What `train.epochs` comes to, for the user; nothing where steps are given."""
    epochs, batch = config.train.epochs, config.data.global_batch_size
    if epochs is None:
        return ""
    return f"train.epochs = {epochs:g}: {total_steps(config, rows):,} steps of {batch:,} of {rows:,} rows"

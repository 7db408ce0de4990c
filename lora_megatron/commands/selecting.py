# SPDX-License-Identifier: Apache-2.0
"""What `train.best` means: the number by which a run's evaluations are compared."""

from __future__ import annotations

from lora_megatron.config import Config
from lora_megatron.errors import ConfigError
from lora_megatron.training.selection import Selection

_NAMES = ("none", "loss")


def choose_selection(config: Config) -> Selection | None:
    """None where no best is kept.

    Raises:
        ConfigError: the name is unknown, or there is nothing to choose between.
    """
    name = config.train.best
    if name not in _NAMES:
        raise ConfigError(f"train.best = {name} is unknown: use one of {', '.join(_NAMES)}")
    if name == "none":
        return None
    if config.data.validation is None:
        raise ConfigError(f"train.best = {name} needs rows to evaluate: give data.validation, or set train.best=none")
    if config.train.eval_every == 0:
        raise ConfigError(
            f"train.best = {name} chooses between evaluations, and train.eval_every = 0 makes one only: set it to a "
            "number of steps, or to epoch"
        )
    return Selection(name)

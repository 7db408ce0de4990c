# SPDX-License-Identifier: Apache-2.0
"""What a run is made of, and how it is read: see `sections` and `load`."""

from lora_megatron.config.load import load_config, parse_config
from lora_megatron.config.sections import (
    LARGEST_SEED,
    BaseSection,
    Config,
    MethodSection,
    ModelSection,
    OptimizerSection,
    Target,
)

__all__ = [
    "LARGEST_SEED",
    "BaseSection",
    "Config",
    "MethodSection",
    "ModelSection",
    "OptimizerSection",
    "Target",
    "load_config",
    "parse_config",
]

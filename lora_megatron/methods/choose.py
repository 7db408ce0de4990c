# SPDX-License-Identifier: Apache-2.0
"""From the configuration's method section to a method."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from lora_megatron.config import MethodSection
from lora_megatron.errors import ConfigError
from lora_megatron.methods.baselines import BitFit, FineTuneTop, Full
from lora_megatron.methods.lora import TARGET_OF_PROJECTION, Lora, parse_layers
from lora_megatron.methods.method import Method


def _lora(section: MethodSection, num_layers: int) -> Method:
    for where, ranks in [("targets", section.targets), *((f"layers[{p}]", r) for p, r in section.layers.items())]:
        for target, rank in ranks.items():
            if rank < 0 or (rank == 0 and where == "targets"):
                raise ConfigError(f"method.{where}.{target} = {rank}: a rank must be at least 1")
    layers = parse_layers(section.layers, num_layers)
    targets = {str(target): rank for target, rank in section.targets.items()}
    method = Lora(targets, section.alpha, section.scaling == "rslora", layers)
    if not any(method.rank(layer, projection) for layer in range(num_layers) for projection in TARGET_OF_PROJECTION):
        how = "is empty" if not targets else "is overruled by rank 0 for every layer in method.layers"
        raise ConfigError(f"method.targets {how}: name at least one of q, k, v, o, fc1, fc2 and its rank")
    return method


METHODS: dict[str, Callable[[MethodSection, int], Method]] = {
    "lora": _lora,
    "full": lambda section, num_layers: Full(),
    "bitfit": lambda section, num_layers: BitFit(),
    "ft_top2": lambda section, num_layers: FineTuneTop(num_layers),
}


def choose_method(section: MethodSection, *, num_layers: int) -> Method:
    """The method `section` names.

    Raises:
        ConfigError: no such method, or ranks that cannot work.
    """
    if section.name not in METHODS:
        nearest = difflib.get_close_matches(section.name, METHODS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"unknown method.name {section.name!r}: did you mean {nearest}? (valid: {', '.join(METHODS)})"
        )
    return METHODS[section.name](section, num_layers)

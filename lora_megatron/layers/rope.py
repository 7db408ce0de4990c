# SPDX-License-Identifier: Apache-2.0
"""Rotary positions and the ways their frequencies are stretched for longer contexts.

Pair i of a head's first `dim` dimensions turns by position * f_i, f_i = base^(-2 i / dim) (Su et al. 2021). Scaled:

| rope_type | frequencies                                                             | reference               |
|-----------|-------------------------------------------------------------------------|-------------------------|
| linear    | f_i / factor                                                            | Chen et al. 2023        |
| dynamic   | f_i up to max_position_embeddings, and longer sequences are refused here | bloc97, emozilla 2023  |
| llama3    | slow ones / factor, fast ones kept, a blend of both between             | Llama 3.1               |
| yarn      | the same with a ramp over i, and cos and sin times an attention factor  | Peng et al. 2023        |

The attention factor multiplies q and k alike, so where the whole head turns it is a softmax scale of its square.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_megatron.errors import ConfigError

_NEEDED = {
    "default": (),
    "dynamic": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
SCALING_KEYS = ("rope_type", *_NEEDED["llama3"], *_OPTIONAL, "truncate")
"""What a `scaling` can say."""


def inverse_frequencies(dim: int, *, base: float, scaling: Mapping[str, Any]) -> Tensor:
    """f_i of the dim / 2 pairs, float32 [dim / 2] on the CPU; `scaling` is empty or has a `rope_type`.

    Raises:
        ConfigError: an unknown rope_type, or a missing or impossible factor.
    """
    assert dim % 2 == 0, dim  # the shape has refused odd ones
    kind = check_scaling(scaling)
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    frequencies = 1.0 / base**exponents
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "llama3":
        return _llama3(frequencies, scaling)
    if kind == "yarn":
        keep = 1 - _yarn_ramp(dim, base, scaling)
        return (frequencies / scaling["factor"]) * (1 - keep) + frequencies * keep
    return frequencies


def attention_factor(scaling: Mapping[str, Any]) -> float:
    """What cos and sin are multiplied by: 1 but for yarn."""
    if scaling.get("rope_type") != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def grown(weight: float) -> float:
        return 1.0 if scaling["factor"] <= 1 else 0.1 * weight * math.log(scaling["factor"]) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return grown(scaling["mscale"]) / grown(scaling["mscale_all_dim"])
    return grown(1.0)


def check_scaling(scaling: Mapping[str, Any]) -> str:
    """The rope_type of `scaling`; raises ConfigError for what `inverse_frequencies` refuses."""
    kind = scaling.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in _NEEDED:
        raise ConfigError(f"rope_type {kind!r} is not supported: this version knows {', '.join(_NEEDED)}")
    optional = [name for name in _OPTIONAL if scaling.get(name) is not None]
    for name in (*_NEEDED[kind], *optional):
        value = scaling.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
            raise ConfigError(f"rope_type {kind} needs {name} > 0, not {value!r}: see the model's configuration")
    if not isinstance(scaling.get("truncate", True), bool):
        raise ConfigError(f"rope_type {kind} needs truncate true or false, not {scaling['truncate']!r}")
    if kind == "llama3" and not scaling["high_freq_factor"] > scaling["low_freq_factor"]:
        raise ConfigError(
            f"rope_type llama3 needs high_freq_factor > low_freq_factor, not {scaling['high_freq_factor']} and "
            f"{scaling['low_freq_factor']}"
        )
    return str(kind)


def _llama3(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Between the wavelengths L / high and L / low (L: the original context) the two regimes are blended."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    length, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    wavelengths = 2 * math.pi / frequencies
    blend = ((length / wavelengths - low) / (high - low)).clamp(0, 1)  # 0: slow, divided; 1: fast, kept
    return (1 - blend) * frequencies / factor + blend * frequencies


def _yarn_ramp(dim: int, base: float, scaling: Mapping[str, Any]) -> Tensor:
    """0 for pairs that turn more than beta_fast times over the original context, 1 below beta_slow, linear between."""

    def pair(turns: float) -> float:
        return (
            dim * math.log(scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(base))
        )

    first, last = pair(scaling.get("beta_fast") or 32), pair(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001
    return ((torch.arange(dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)

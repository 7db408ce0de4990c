# SPDX-License-Identifier: Apache-2.0
"""Time by kernel and by kind of kernel, from what `bench.communication.watch` saw of some steps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora_megatron.bench.communication import Kernel, collective_of

KINDS: tuple[tuple[str, str], ...] = (
    ("attention", r"sdpa|flash|fmha|scaled_dot_product"),
    (
        "low-rank kernels",
        r"^_add$|^_add_rows$|^_add_residual$|^_gradients$|^_sum$|^activate_adapted$|^activate_and_project$"
        r"|^adapted_gradients$|^add_input_product$|^normed_factor_gradients$",
    ),
    ("sums over ranks", r"^_sum_in_order$|^_sum_and_add$"),
    ("rotary positions", r"^_turn$"),
    ("FP8 casts and transposes", r"^_quantise_rows$|^_quantise_held$|^_transpose$|^_forward$|^_backward$|^_unpack$"),
    ("norms and activations", r"^_norm$|^_norm_gradient$|layer_norm|gelu|silu"),
    ("dropout", r"^_drop$"),
    ("loss", r"^_loss_statistics$|^_loss_gradient$"),
    ("optimizer", r"multi_tensor|foreach|adam"),
    ("products", r"gemm|nvjet|cutlass|xmma|splitk|gemv|aten::(mm|addmm|bmm|_scaled_mm)\b"),
    ("copies and fills", r"memcpy|memset|copy|fill"),
)
"""A kernel that is no collective is of the first kind whose pattern its name matches; the rest is `other`. Names
between ^ and $ are those of `lora_megatron.layers`, whose activations write FP8."""
COLLECTIVES = "communication"


@dataclass(frozen=True)
class KernelTime:
    """All launches of one kernel in a step: how many, and their seconds."""

    name: str
    kind: str
    launches: float
    seconds: float


def kind_of(name: str) -> str:
    """The kind of a kernel, from its name."""
    if collective_of(name):
        return COLLECTIVES
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def short_name(name: str, length: int = 88) -> str:
    """A template's name without what every name of torch's has."""
    for noise in ("void ", "at::native::", "(anonymous namespace)::", "<unnamed>::", "at::detail::"):
        name = name.replace(noise, "")
    return name if len(name) <= length else name[: length - 3] + "..."


def kernel_times(kernels: Iterable[Kernel], *, steps: int) -> list[KernelTime]:
    """Of one of these steps, kernel by kernel, the longest first."""
    sums: dict[str, tuple[int, float]] = {}
    for kernel in kernels:
        launches, seconds = sums.get(kernel.name, (0, 0.0))
        sums[kernel.name] = (launches + 1, seconds + kernel.seconds)
    return _longest_first(
        KernelTime(name, kind_of(name), launches / steps, seconds / steps) for name, (launches, seconds) in sums.items()
    )


def per_layer(small: Sequence[KernelTime], large: Sequence[KernelTime], *, layers: int) -> list[KernelTime]:
    """What one more layer adds to each kernel: two slices' times that are `layers` layers apart.

    Less than nothing for a kernel in whose place the larger slice runs another.
    """
    before, after = ({time.name: time for time in times} for times in (small, large))
    found = []
    for name in {**after, **before}:
        launches, seconds = (
            getattr(after.get(name), field, 0.0) - getattr(before.get(name), field, 0.0)
            for field in ("launches", "seconds")
        )
        found.append(KernelTime(name, kind_of(name), launches / layers, seconds / layers))
    return _longest_first(found)


def kinds_of(times: Iterable[KernelTime]) -> dict[str, tuple[float, float]]:
    """kind -> (launches, seconds), the longest first."""
    sums: dict[str, tuple[float, float]] = {}
    for time in times:
        launches, seconds = sums.get(time.kind, (0.0, 0.0))
        sums[time.kind] = (launches + time.launches, seconds + time.seconds)
    return dict(sorted(sums.items(), key=lambda item: -item[1][1]))


def _longest_first(times: Iterable[KernelTime]) -> list[KernelTime]:
    return sorted(times, key=lambda time: -time.seconds)

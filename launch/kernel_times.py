# SPDX-License-Identifier: Apache-2.0
"""What a device did during some steps, kernel by kernel, as torch's profiler saw it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

KINDS: tuple[tuple[str, str], ...] = (
    ("communication", r"nccl|all_reduce|all_gather|reduce_scatter"),
    ("attention", r"sdpa|flash|fmha|scaled_dot_product"),
    ("low-rank kernels", r"^_add$|^_gradients$|^_input_gradient|^_inner|^_outer|low_rank"),
    ("FP8 casts and transposes", r"^_quantise_rows|^_transpose|^_forward$|^_backward$|^_unpack|^_norm_in_fp8"),
    ("norms and activations", r"^_norm|^_normed|layer_norm|gelu|silu"),
    ("optimizer", r"multi_tensor|foreach|adam"),
    ("products", r"gemm|nvjet|cutlass|xmma|splitk|gemv|aten::(mm|addmm|bmm|_scaled_mm)\b"),
    ("copies and fills", r"memcpy|memset|copy|fill"),
)
"""A kernel is of the first kind whose pattern its name matches; the rest is `other`."""


@dataclass(frozen=True)
class Interval:
    """One kernel: microseconds on the profiler's clock."""

    name: str
    start: float
    stop: float


@dataclass(frozen=True)
class KernelTime:
    """All launches of one kernel in a step: how many, and their seconds."""

    name: str
    kind: str
    launches: float
    seconds: float


def kind_of(name: str) -> str:
    """The kind of a kernel, from its name."""
    for kind, pattern in KINDS:
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "other"


def short_name(name: str, length: int = 88) -> str:
    """A template's name without what every name of torch's has."""
    for noise in ("void ", "at::native::", "(anonymous namespace)::", "<unnamed>::", "at::detail::"):
        name = name.replace(noise, "")
    return name if len(name) <= length else name[: length - 3] + "..."


def profiled(step: Callable[[], object], steps: int) -> list[Interval]:
    """The kernels of `steps` calls of `step`; on a machine without a GPU torch's operations instead."""
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() > 0
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as found:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [event for event in found.events() if event.device_type == wanted]
    return [Interval(event.name, event.time_range.start, event.time_range.end) for event in events]


def kernel_times(intervals: Iterable[Interval], steps: int) -> list[KernelTime]:
    """Per step and kernel, the longest first."""
    sums: dict[str, list[float]] = {}
    for interval in intervals:
        entry = sums.setdefault(interval.name, [0.0, 0.0])
        entry[0] += 1 / steps
        entry[1] += (interval.stop - interval.start) * 1e-6 / steps
    times = [KernelTime(name, kind_of(name), launches, seconds) for name, (launches, seconds) in sums.items()]
    return sorted(times, key=lambda time: -time.seconds)


def busy_seconds(intervals: Iterable[Interval]) -> float:
    """Seconds in which at least one kernel ran."""
    total, until = 0.0, float("-inf")
    for interval in sorted(intervals, key=lambda interval: interval.start):
        total += max(0.0, interval.stop - max(interval.start, until))
        until = max(until, interval.stop)
    return total * 1e-6


def exposed_seconds(intervals: Sequence[Interval], kind: str = "communication") -> float:
    """Seconds in which kernels of `kind` ran and no other did: what they cost a step, overlap left out."""
    others = [interval for interval in intervals if kind_of(interval.name) != kind]
    return busy_seconds(intervals) - busy_seconds(others)


def per_layer(small: Sequence[KernelTime], large: Sequence[KernelTime], layers: int) -> list[KernelTime]:
    """What one more layer adds to each kernel: two slices' times that are `layers` layers apart."""
    before = {time.name: time for time in small}
    nothing = KernelTime("", "", 0.0, 0.0)
    found = []
    for time in large:
        base = before.get(time.name, nothing)
        launches = (time.launches - base.launches) / layers
        found.append(KernelTime(time.name, time.kind, launches, (time.seconds - base.seconds) / layers))
    return sorted(found, key=lambda time: -time.seconds)

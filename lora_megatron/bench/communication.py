# SPDX-License-Identifier: Apache-2.0
"""What a device did during some steps, kernel by kernel, and the share of communication in it.

With C the time in which a collective's kernel ran on this rank, or what `layers.exchange` has in place of one (copies
between GPUs, barriers), W the same of everything else (other kernels, copies) and T the step, all as sets of moments:

    share of communication    |C| / T
    of which exposed          (|C u W| - |W|) / T     nothing else ran beside it
    idle                      1 - |C u W| / T         nothing ran at all: kernels come too slowly, or the host waits

A collective's kernel starts when its own rank is there and ends when all have been: waiting for others, such as a
pipeline's bubble, counts as communication.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Span = tuple[int, int]
"""Start and end in nanoseconds."""
_COLLECTIVES = {
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "reducescatter": "reduce-scatter",
    "sendrecv": "send and receive",
    "broadcast": "broadcast",
    "alltoall": "all-to-all",
}
_COPY = "Memcpy PtoP"  # between two devices; one inside a device is DtoD
_MARKS = ("nccl:", "Context Sync", "Stream Sync", "Event Sync", "Stream Wait Event")


@dataclass(frozen=True)
class Kernel:
    """What ran on the device, a copy or a fill included."""

    name: str
    span: Span

    @property
    def seconds(self) -> float:
        """From its start to its end."""
        return union_seconds([self.span])

    @property
    def collective(self) -> str | None:
        """See `collective_of`."""
        return collective_of(self.name)


@dataclass(frozen=True)
class Communication:
    """Seconds of one rank over the profiled steps."""

    steps: int
    whole: float
    """The steps by the clock, which the profiler makes longer."""
    communicating: float
    exposed: float
    busy: float
    by_collective: dict[str, float]
    """Sums of kernels, which may run at one time."""

    def facts(self) -> dict[str, Any]:
        """The same as shares, for a report."""
        return {
            "share": self.communicating / self.whole,
            "exposed_share": self.exposed / self.whole,
            "idle_share": max(0.0, 1 - self.busy / self.whole),
            "step_seconds": self.whole / self.steps,
            "by_collective": {name: seconds / self.whole for name, seconds in sorted(self.by_collective.items())},
        }


def collective_of(name: str) -> str | None:
    """`all-reduce` and so on for the name of a kernel of NCCL or of torch's symmetric memory; None for any other."""
    if name.startswith(_COPY):
        return "copies between GPUs"
    name = name.lower().replace("_", "")
    if "barrierkernel" in name:
        return "barrier"
    if not name.startswith("nccl"):
        return None
    return next((told for part, told in _COLLECTIVES.items() if part in name), "other")


def union_seconds(spans: Iterable[Span]) -> float:
    """How long at least one of the spans lasted."""
    total, reached = 0, None
    for start, end in sorted(spans):
        begin = start if reached is None else max(start, reached)
        if end > begin:
            total += end - begin
            reached = end
    return total / 1e9


def communication_of(kernels: Sequence[Kernel], *, steps: int, whole: float) -> Communication:
    """`whole`: seconds of the steps in which these kernels ran."""
    collectives = [kernel for kernel in kernels if kernel.collective]
    others = [kernel.span for kernel in kernels if not kernel.collective]
    busy = union_seconds(kernel.span for kernel in kernels)
    sums: dict[str, float] = {}
    for kernel in collectives:
        sums[str(kernel.collective)] = sums.get(str(kernel.collective), 0.0) + kernel.seconds
    communicating = union_seconds(kernel.span for kernel in collectives)
    return Communication(steps, whole, communicating, busy - union_seconds(others), busy, sums)


def profile(step: Callable[[], float], *, steps: int) -> Communication | None:
    """Take `steps` steps, each of which tells its seconds, and look at this rank's GPU meanwhile.

    None without a GPU, or where the profiler saw no kernel (it is not allowed to).
    """
    if not steps or not torch.cuda.is_available():
        return None
    kernels, whole = watch(step, steps=steps)
    return communication_of(kernels, steps=steps, whole=whole) if kernels else None


def watch(step: Callable[[], float], *, steps: int) -> tuple[list[Kernel], float]:
    """(what ran on this rank's device, the seconds that the steps told). On a machine without a GPU torch's operations
    stand for kernels: one that calls another counts twice, and only their union is a time."""
    on_gpu = torch.cuda.is_available()
    kind = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profiler:
        whole = sum(step() for _ in range(steps))
    return _kernels(profiler, torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU), whole


def _kernels(profiler: Any, device: torch.autograd.DeviceType) -> list[Kernel]:
    """From the raw events: torch's own list of them takes minutes to build from the kernels of a large model."""
    return [
        Kernel(event.name(), (event.start_ns(), event.start_ns() + event.duration_ns()))
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == device and not _is_mark(event)
    ]


def _is_mark(event: Any) -> bool:
    """Not work of the device but a range that somebody named, such as torch's `nccl:all_reduce` around a kernel, or
    the host's waiting."""
    annotated = getattr(event, "is_user_annotation", lambda: False)
    return bool(event.name().startswith(_MARKS) or annotated())

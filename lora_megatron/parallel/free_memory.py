# SPDX-License-Identifier: Apache-2.0
"""How much memory is left where a rank runs: what a plan is held against before anything big is allocated."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch
import torch.distributed as dist


def free_memory() -> int | None:
    """Bytes that this rank's GPU has left, or the machine's memory for all its ranks; None where it does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    return available_host_memory()


def available_host_memory() -> int | None:
    """Bytes that new processes of this machine, or of this container, can have; None where it does not tell."""
    limits: list[int] = []
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError):  # no cgroup of version 2, or no limit ("max")
        cgroup = Path("/sys/fs/cgroup")
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        limits.append(limit - used + int(stat["file"]))  # cached files make room
    return min(limits, default=None)


def free_for_this_rank() -> int | None:
    """The same for one rank: ranks on a CPU share their machine's memory evenly."""
    free = free_memory()
    if free is None or torch.cuda.is_available():
        return free
    return free // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())))

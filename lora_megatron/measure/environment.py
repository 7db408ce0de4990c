# SPDX-License-Identifier: Apache-2.0
"""Where a run ran: versions, commit, devices. Nothing that names a machine or a person, no environment variables."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_PACKAGES = ("lora-megatron", "torch", "megatron-core", "numpy", "pyarrow", "safetensors", "tokenizers")
# Used where they are installed, so their absence is a fact about the run as well.
_OPTIONAL_PACKAGES = ("deepspeed", "apex", "transformer_engine", "triton", "flash-attn-4")
_CHECKOUT = Path(__file__).resolve().parents[2]


def describe_environment() -> dict[str, Any]:
    """Python, platform, package versions, git state of the checkout, backend and devices, as JSON values."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: _version(name) for name in (*_PACKAGES, *_OPTIONAL_PACKAGES)},
        "git": _git_state(_CHECKOUT),
        "backend": _backend(),
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
        "devices": _devices(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether tracked files differ from it; None when the package does not run from a git checkout."""
    # An installed copy may lie inside somebody else's repository (a .venv): only one that tracks this file counts.
    if _git(folder, "ls-files", "--error-unmatch", str(Path(__file__).resolve())) is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command, or None when there is no git, no repository, or it is slow."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _backend() -> str:
    if dist.is_initialized():
        return str(dist.get_backend())
    return "nccl" if torch.cuda.is_available() else "gloo"


def _devices() -> dict[str, Any]:
    """GPUs that this process sees (memory in bytes), or the CPU."""
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return {
            "type": "cuda",
            "cuda": torch.version.cuda,
            "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        }
    return {
        "type": "cpu",
        "name": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
    }


def _cpu_name() -> str:
    """The processor's model name; its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None

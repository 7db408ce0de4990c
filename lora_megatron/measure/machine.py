# SPDX-License-Identifier: Apache-2.0
"""What a run meets on this machine besides software: the disk of its folder, shared memory, limits, threads."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import tempfile
from pathlib import Path

from lora_megatron.measure.software import Found
from lora_megatron.measure.units import show_bytes

SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_MEMORY = 2**30  # containers get 64 MiB by default, and NCCL keeps its buffers of a node there
LEAST_FREE = 2**30
LEAST_FILES = 4096


def run_folder(folder: Path) -> Found:
    """Whether `folder`, or the nearest one above it that is there, can be written and locked, and has room."""
    while not folder.exists():
        folder = folder.parent
    kind = _file_system(folder)
    try:
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as inside:
            locks = _has_locks(Path(inside))
            unnamed = _has_unnamed_files(Path(inside))
    except OSError as error:
        return Found("wrong", kind, f"{folder} cannot be written ({error.strerror}): set run.dir to another folder")
    note = f"{show_bytes(free)} free at {folder.resolve()}"
    if free < LEAST_FREE:
        return Found("wrong", kind, f"only {note}: make room, or set run.dir to another disk")
    if not locks:
        return Found("wrong", kind, f"{note}; no locks: two jobs in one run.dir would not notice each other")
    return Found("ok", kind, note + ("" if unnamed else "; no O_TMPFILE, which nothing here needs"))


def _file_system(folder: Path) -> str:
    """Its type by the longest mount point above `folder`; empty where the system does not tell."""
    best, kind = -1, ""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in mounts:
        _, point, name, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if folder.resolve().is_relative_to(point) and len(point) > best:
            best, kind = len(point), name
    return kind


def _has_locks(folder: Path) -> bool:
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return False
        raise
    finally:
        os.close(descriptor)
    return True


def _has_unnamed_files(folder: Path) -> bool:
    try:
        os.close(os.open(folder, getattr(os, "O_TMPFILE", 0) | os.O_RDWR, 0o600))
    except OSError:
        return False
    return hasattr(os, "O_TMPFILE")


def shared_memory(*, gpus: int, folder: Path = SHARED_MEMORY) -> Found:
    """Size of /dev/shm; several GPUs of a node talk through it where they have no direct link."""
    if not folder.is_dir():
        return Found("absent")
    size = shutil.disk_usage(folder).total
    if gpus > 1 and size < LEAST_SHARED_MEMORY:
        remedy = "start the container with --shm-size=1g or --ipc=host"
        return Found("wrong", show_bytes(size), f"NCCL needs more between the GPUs of a node: {remedy}")
    return Found("ok", show_bytes(size))


def limits(*, gpus: int) -> Found:
    """Open files and locked memory of a process."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shown = f"{'unlimited' if files == resource.RLIM_INFINITY else files} open files"
    if files != resource.RLIM_INFINITY and files < LEAST_FILES:
        return Found("wrong", shown, f"connections and shards are files: ulimit -n {LEAST_FILES}")
    if gpus and locked != resource.RLIM_INFINITY:
        return Found("ok", shown, f"{show_bytes(locked)} of locked memory: InfiniBand wants ulimit -l unlimited")
    return Found("ok", shown)


def threads() -> Found:
    """OMP_NUM_THREADS against the cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = os.environ.get("OMP_NUM_THREADS")
    if text is None:
        return Found("absent", f"{cores} cores", "launch/torchrun.sh sets it to cores / processes, torchrun to 1")
    if not text.isdecimal() or int(text) < 1:
        return Found("wrong", text, f"OMP_NUM_THREADS is no number of threads: unset it, or 1 to {cores}")
    if int(text) > cores:
        return Found("wrong", text, f"more threads than the {cores} cores make every rank slower: set fewer")
    return Found("ok", text, f"of {cores} cores")

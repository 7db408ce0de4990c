# SPDX-License-Identifier: Apache-2.0
"""The process that started this one, torchrun as a rule: no worker outlives it, and a restart knows it again.

Nothing here imports torch: a worker must be bound to its launcher before it spends seconds on that.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_OWN_AGENT = ("lora_megatron.commands.launch", "lora_megatron/commands/launch.py")


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent dies, even of SIGKILL; Linux only.

    For ranks, which have a launcher, and for helper processes that a rank starts (a child does not inherit it).
    torchrun killed by SIGKILL or SIGUSR1 would otherwise leave workers that go on writing.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died in between, and the kernel will not tell
        os.kill(os.getpid(), signal.SIGKILL)


def is_rank() -> bool:
    """Whether a launcher started this process as one rank of a world."""
    return "RANK" in os.environ


def leave_others() -> None:
    """To be called where an exception that nobody expected is handled: if this is one of several ranks, print it and
    end the process with 1.

    Nothing that waits for the others may run, such as NCCL's destructors, or CUDA's, which wait for streams that wait
    for another rank's numbers (`stream_values`). The launcher ends the others.
    """
    if not is_rank() or os.environ.get("WORLD_SIZE", "1") == "1":
        return
    for tell in (traceback.print_exc, sys.stdout.flush, sys.stderr.flush):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            tell()
    os._exit(1)


def launcher_identity() -> str:
    """Host, process and start time of the launcher: torchrun stays the same over its restarts, and only over them."""
    parent = os.getppid()
    try:
        # /proc/PID/stat: the name stands in parentheses and may hold anything; the start time is field 22.
        fields = Path(f"/proc/{parent}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        started = fields[19]
    except (OSError, IndexError):
        started = ""
    return f"{socket.gethostname()}:{parent}:{started}"


def grace_of_torchrun(torch_version: str) -> float | None:
    """Seconds from a signal that torchrun passed on to its kill; None without torchrun or where it sets no limit.

    30, or from torch 2.12 on what --shutdown-timeout or TORCH_ELASTIC_SHUTDOWN_TIMEOUT says. The agent that
    `launch/torchrun.sh` starts waits for its workers.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        command = []
    if any(word.endswith(_OWN_AGENT) for word in command):
        return None
    if tuple(int(part) for part in torch_version.split(".")[:2]) < (2, 12):
        return 30.0
    said = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
    for word, following in zip(command, [*command[1:], ""], strict=True):
        name, equals, value = word.replace("_", "-").partition("=")
        if name == "--shutdown-timeout":
            said = value if equals else following
    return float(said) if said.isdecimal() else 30.0


def restart_count() -> int:
    """How many times torchrun has restarted its workers; 0 without torchrun and for the first attempt."""
    try:
        return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    except ValueError:
        return 0

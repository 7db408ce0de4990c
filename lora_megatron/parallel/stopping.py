# SPDX-License-Identifier: Apache-2.0
"""A termination signal asks; the ranks answer together.

SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 set a flag and nothing else, so a collective or a write that is under way runs to
its end. The flag is reduced over all ranks where every rank passes (the end of a step, between evaluation batches,
between the phases of starting), and there all of them stop. A second signal changes nothing; SIGKILL cannot be put off.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import torch
import torch.distributed as dist

from lora_megatron.errors import Preempted
from lora_megatron.parallel.agree import device_for_collectives

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_received = 0  # the first of them that came to this process


def _remember(number: int, frame: FrameType | None) -> None:
    global _received
    _received = _received or number


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Within, the signals set the flag. Only a process's main thread may listen; in another nothing changes."""
    global _received
    _received = 0
    is_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, _remember) for number in SIGNALS if is_main_thread}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def received() -> int:
    """The signal that came to this process first, 0 for none; to be reduced by MAX over all ranks."""
    return _received


def stop_if_asked() -> None:
    """Raise Preempted on every rank if a signal came to any; collective."""
    number = torch.tensor(_received, device=device_for_collectives())
    dist.all_reduce(number, dist.ReduceOp.MAX)
    stop_on(int(number))


def stop_on(number: int) -> None:
    """Raise Preempted for a signal that all ranks agreed on, unless it is 0."""
    if number:
        raise Preempted(signal.Signals(number).name)

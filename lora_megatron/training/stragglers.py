# SPDX-License-Identifier: Apache-2.0
"""Which rank the others wait for.

Collectives make the steps of all ranks equally long, so the time of a step does not tell. What a rank does by itself
does: how long it makes its data, and how long a fixed piece of work takes on its device (a probe of some milliseconds
that touches no parameter and no random number).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_megatron.parallel.agree import gather_text
from lora_megatron.parallel.heartbeat import data_seconds

SLOW = 1.2
"""Times the median rank."""
_NOTICEABLE = 0.05
"""Share of a step that the data of a rank must take beyond the median's to matter."""
_REPEATS = 5  # the shortest counts: whatever else runs on the machine only makes a probe longer


@dataclass(frozen=True)
class Look:
    """One line of stragglers.jsonl: seconds of each rank, and the rank that is slow, if one is."""

    step: int
    busy_seconds: list[float]
    """Of both below together."""
    data_seconds: list[float]
    """Making data, a step."""
    probe_seconds: list[float]
    """The fixed piece of work."""
    slowest: int | None
    reason: str


class Stragglers:
    """Looks every so many steps; 0 is never."""

    def __init__(self, every: int) -> None:
        self._every, self._steps, self._data_before = every, 0, data_seconds()

    def after_step(self, step: int, step_seconds: float) -> Look | None:
        """Collective when due (on all ranks alike), else nothing."""
        self._steps += 1
        if not self._every or step % self._every:
            return None
        mine = ((data_seconds() - self._data_before) / self._steps, probe_seconds())
        self._steps, self._data_before = 0, data_seconds()
        of_ranks = [json.loads(text) for text in gather_text(json.dumps(mine))]
        return judge(step, [data for data, _ in of_ranks], [probe for _, probe in of_ranks], step_seconds)


def judge(step: int, data: Sequence[float], probe: Sequence[float], step_seconds: float) -> Look:
    """Name a rank whose device or data takes 1.2 times the median's time, the data noticeably in a step."""
    usual_data, usual_probe = statistics.median_low(data), statistics.median_low(probe)
    worst_probe, worst_data = max(range(len(probe)), key=probe.__getitem__), max(range(len(data)), key=data.__getitem__)
    slowest, reason, ratio = None, "", probe[worst_probe] / usual_probe
    late = data[worst_data] - usual_data
    if ratio >= SLOW:
        slowest, reason = worst_probe, f"its device takes {ratio:.2f} times as long as the median rank's"
    elif data[worst_data] >= SLOW * usual_data and late >= _NOTICEABLE * step_seconds:
        slowest = worst_data
        reason = f"its data takes {1000 * late:.0f} ms a step longer than the median rank's"
    busy = [one + other for one, other in zip(data, probe, strict=True)]
    return Look(step, busy, list(data), list(probe), slowest, reason)


@torch.no_grad()
def probe_seconds() -> float:
    """The shortest of some times of the same matrix products: bf16 on a GPU, fp32 on a CPU."""
    on_gpu = torch.cuda.is_available()
    size, products = (2048, 16) if on_gpu else (256, 4)
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    matrix = torch.full((size, size), 1e-3, dtype=torch.bfloat16 if on_gpu else torch.float32, device=device)
    out = torch.empty_like(matrix)
    return min(_time(matrix, out, products) for _ in range(_REPEATS))


def _time(matrix: Tensor, out: Tensor, products: int) -> float:
    torch.cuda.synchronize()  # nothing without a GPU (parallel.cpu_backend)
    started = time.perf_counter()
    for _ in range(products):
        torch.matmul(matrix, matrix, out=out)
    torch.cuda.synchronize()
    return time.perf_counter() - started

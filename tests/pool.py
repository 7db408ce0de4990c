# SPDX-License-Identifier: Apache-2.0
"""A pool of processes that lives for the whole test session, so that torch and megatron-core are imported once.

`Pool.run(world_size, function, **arguments)` calls `function(**arguments)` on that many ranks inside a fresh gloo (or
NCCL) world and returns what each rank returned. Functions and arguments must be picklable: module-level functions.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.multiprocessing as mp

WORLD_TIMEOUT_S = 300  # of a collective: a rank left alone by a failed one ends then
JOB_TIMEOUT_S = 600  # minutes, because the machine may be busy with other work
GRACE_S = 10  # what the other ranks get to answer once one has failed


def _worker(rank: int, backend: str, jobs: Any, answers: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    from lora_megatron.parallel import groups

    timeout = timedelta(seconds=WORLD_TIMEOUT_S)
    while (job := _next(jobs)) is not None:
        world_size, store, function, arguments = job
        try:
            dist.init_process_group(
                backend, init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout
            )
            # By value: torch would send each tensor as an open file, of which a process may hold a thousand.
            answers.put((rank, pickle.dumps(function(**arguments)), None))
        except BaseException:
            answers.put((rank, None, traceback.format_exc()))
        finally:
            groups.stop()


def _next(jobs: Any) -> Any:
    """The next job; None when there will be none, also because the test session was killed."""
    parent = mp.parent_process()
    while parent is not None and parent.is_alive():
        with contextlib.suppress(queue.Empty):
            return jobs.get(timeout=5)
    return None


class Pool:
    """Processes 0 .. size - 1; over gloo they see no GPU, so that a CPU test stays one on any machine."""

    def __init__(self, size: int, backend: str = "gloo") -> None:
        self.size, self.backend = size, backend
        self._start()

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self.answers = context.Queue()
        self.jobs = [context.Queue() for _ in range(self.size)]
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if self.backend == "gloo":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self.processes = [
            context.Process(target=_worker, args=(rank, self.backend, self.jobs[rank], self.answers), daemon=True)
            for rank in range(self.size)
        ]
        for process in self.processes:
            process.start()
        if self.backend == "gloo":
            os.environ.pop("CUDA_VISIBLE_DEVICES")
            if visible is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = visible

    def run(self, world_size: int, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        """What `function(**arguments)` returned on each rank; AssertionError with every traceback if one raised."""
        results: dict[int, Any] = {}
        failures: list[str] = []
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(world_size):
                self.jobs[rank].put((world_size, f"{folder}/store", function, arguments))
            while len(results) < world_size:
                try:
                    rank, result, failure = self.answers.get(timeout=GRACE_S if failures else JOB_TIMEOUT_S)
                except queue.Empty:
                    failures.append(f"no answer from ranks {sorted(set(range(world_size)) - set(results))}")
                    self._restart()
                    break
                results[rank] = None if failure else pickle.loads(result)
                if failure:
                    failures.append(f"rank {rank}:\n{failure}")
        if failures:
            raise AssertionError("\n".join(failures))
        return [results[rank] for rank in range(world_size)]

    def _restart(self) -> None:
        """A rank that waits in a collective for one that failed answers nothing: begin with new processes."""
        for process in self.processes:
            process.kill()
            process.join()
        self._start()

    def close(self) -> None:
        for jobs in self.jobs:
            jobs.put(None)
        for process in self.processes:
            process.join(timeout=3)
            if process.is_alive():
                process.kill()

# SPDX-License-Identifier: Apache-2.0
"""A pool of processes that lives for the whole test session, so that torch and megatron-core are imported once.

`Pool.run(world_size, function, **arguments)` calls `function(**arguments)` on that many ranks inside a fresh gloo (or
NCCL) world and returns what each rank returned. Functions and arguments must be picklable: module-level functions.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


def _worker(rank: int, backend: str, jobs: Any, answers: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    from lora_megatron.parallel import groups

    while (job := jobs.get()) is not None:
        world_size, store, function, arguments = job
        try:
            dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)
            answers.put((rank, function(**arguments), None))
        except BaseException:
            answers.put((rank, None, traceback.format_exc()))
        finally:
            groups.stop()


class Pool:
    def __init__(self, size: int, backend: str = "gloo") -> None:
        context = mp.get_context("spawn")
        self.answers = context.Queue()
        self.jobs = [context.Queue() for _ in range(size)]
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self.processes = [
            context.Process(target=_worker, args=(rank, backend, self.jobs[rank], self.answers), daemon=True)
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def run(self, world_size: int, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(world_size):
                self.jobs[rank].put((world_size, f"{folder}/store", function, arguments))
            results: dict[int, Any] = {}
            failures = []
            for _ in range(world_size):
                rank, result, failure = self.answers.get(timeout=300)
                results[rank] = result
                if failure:
                    failures.append(f"rank {rank}:\n{failure}")
            if failures:
                raise AssertionError("\n".join(failures))
        return [results[rank] for rank in range(world_size)]

    def close(self) -> None:
        for queue in self.jobs:
            queue.put(None)
        for process in self.processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()

# SPDX-License-Identifier: Apache-2.0
"""torchrun's agent, one a node, that knows what our exit statuses mean.

The agent of torch does three things that cost a run on a cluster:

- it ends with 1 whatever its workers ended with: this one ends with the status of its workers;
- it dies of SIGUSR1 and SIGUSR2, which Slurm sends before a time limit, and kills workers that need more than 30 s to
  save after SIGTERM: this one hands a signal on to its workers and waits for them (the scheduler has the last word);
- it starts anew a run that a new start cannot mend: this one restarts for crashes and lost ranks alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from types import FrameType
from typing import Any, ClassVar

from torch.distributed.elastic.agent.server import WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.api import RunResult
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException

from lora_megatron.errors import EXIT_PREEMPTED, EXIT_STATUS_BY_NAME, LostRankError

# What a signal to the agent becomes for its workers; a closed terminal (SIGHUP) shall not lose a run either.
FORWARDED = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGUSR2: signal.SIGUSR2,
}
EXIT_LOST_RANK = LostRankError.exit_status
# Of what a new start would only repeat, or must not undo.
FINAL = {EXIT_PREEMPTED, *EXIT_STATUS_BY_NAME.values()} - {EXIT_LOST_RANK}
_COUNT = "restarts"


class Agent(LocalElasticAgent):
    """Starts the workers of this node, hands signals on to them, and restarts them where that can help."""

    signalled = False  # whether this node was told to stop; kept by the class, as a process has one agent
    exit_codes: ClassVar[list[int]] = []  # of the workers that failed, also where torch raises something else

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        """Meet the other nodes, and agree with them on how many restarts there were.

        A node that only hears of another's failure does not count a restart, and the workers would disagree on
        TORCHELASTIC_RESTART_COUNT, under which they look for each other.
        """
        self._stop_if_signalled()
        super()._rendezvous(worker_group)
        self._stop_if_signalled()
        most, store, nodes = worker_group.spec.max_restarts, worker_group.store, worker_group.group_world_size
        assert store is not None
        assert nodes is not None
        store.set(f"{_COUNT}/{worker_group.group_rank}", str(most - self._remaining_restarts))
        self._remaining_restarts = most - max(int(store.get(f"{_COUNT}/{node}")) for node in range(nodes))

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        workers: dict[int, Any] = super()._start_workers(worker_group)  # takes the signals for torch's own handler
        for number in FORWARDED:
            signal.signal(number, self._forward)
        return workers

    def _stop_if_signalled(self) -> None:
        """A signal that came between two starts finds no workers: nothing is started after it."""
        if self.signalled:
            raise SignalException("told to stop between two starts", signal.SIGTERM)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        type(self).signalled = True
        for worker in self._pcontext.pids().values() if self._pcontext else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, FORWARDED[signal.Signals(number)])

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            statuses = {failure.exitcode for failure in result.failures.values()}
            if self.signalled or statuses & FINAL:
                self._remaining_restarts = 0
        return result

    def _shutdown(self, *signal_and_timeout: Any, **more: Any) -> None:
        super()._shutdown(*signal_and_timeout, **more)
        ended = self._pcontext.wait(0) if self._pcontext else None
        if ended is not None:
            type(self).exit_codes = [failure.exitcode for _, failure in sorted(ended.failures.items())]


def status_of_workers(exit_codes: Iterable[int], *, signalled: bool) -> int:
    """One exit status for a node from those of its failed workers, in the order of their ranks; negative is a signal.

    One of ours wins over a crash, which is mostly its consequence. A worker that died of the signal it was to stop at
    had begun nothing: it is preempted. None at all: another node failed.
    """
    codes = list(exit_codes)
    for code in codes:
        if code in FINAL:
            return code
    if not codes:
        return EXIT_LOST_RANK
    if signalled and all(-code in FORWARDED.values() or code == EXIT_LOST_RANK for code in codes):
        return EXIT_PREEMPTED  # a rank that lost one which had not begun to listen is none the worse
    if EXIT_LOST_RANK in codes:
        return EXIT_LOST_RANK
    return 128 - codes[0] if codes[0] < 0 else codes[0]

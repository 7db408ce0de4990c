# SPDX-License-Identifier: Apache-2.0
"""What `launch/torchrun.sh` runs on each node: the environment becomes torchrun's arguments, and our agent runs them.

    python -m lora_megatron.commands.launch train CONFIG [overrides]

The variables are described in `launch/torchrun.sh --help`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from types import FrameType
from unittest.mock import patch

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousError, RendezvousTimeoutError

from lora_megatron.config import Config, load_config
from lora_megatron.errors import EXIT_DONE, EXIT_PREEMPTED, ConfigError, LostRankError, UserError
from lora_megatron.parallel.agent import EXIT_LOST_RANK, FINAL, FORWARDED, Agent, status_of_workers

COMMANDS = ("train", "bench", "generate", "evaluate")
LOOPBACK = "127.0.0.1"
_MOST_THREADS = 16


@dataclass(frozen=True)
class Node:
    """This node's part of a job, from the environment."""

    nodes: int
    rank: int
    address: str
    port: int
    processes: int | None
    restarts: int
    job: str
    timeout_seconds: int
    local_address: str | None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Node:
        """Raises ConfigError for what is missing, no number, or out of bounds."""
        nodes = _number(environment, "NNODES", 1, least=1)
        rank = _number(environment, "NODE_RANK", 0, least=0)
        if rank >= nodes:
            raise ConfigError(f"NODE_RANK = {rank} with NNODES = {nodes}: nodes count from 0 to {nodes - 1}")
        if nodes > 1 and not environment.get("MASTER_ADDR"):
            raise ConfigError(f"NNODES = {nodes} needs MASTER_ADDR, the name or address of the node with NODE_RANK = 0")
        if nodes > 1 and "NODE_RANK" not in environment:
            raise ConfigError(f"NNODES = {nodes} needs NODE_RANK, from 0 to {nodes - 1}, another on each node")
        address = environment["MASTER_ADDR"] if nodes > 1 else LOOPBACK
        alone = address in (LOOPBACK, "localhost", "::1")
        return cls(
            nodes=nodes,
            rank=rank,
            address=address,
            port=_number(environment, "MASTER_PORT", 29500, least=1, most=65535) if nodes > 1 else 0,
            processes=_number(environment, "NPROC_PER_NODE", 0, least=1) if "NPROC_PER_NODE" in environment else None,
            restarts=_number(environment, "MAX_RESTARTS", 0, least=0),
            job=environment.get("RDZV_ID") or (f"{address}-{os.getpid()}" if nodes == 1 else "lora-megatron"),
            timeout_seconds=_number(environment, "RDZV_TIMEOUT", 600, least=1),
            local_address=environment.get("LOCAL_ADDR") or (LOOPBACK if alone else None),
        )

    @property
    def endpoint(self) -> str:
        """Where the nodes meet."""
        return f"{self.address}:{self.port}"

    def torchrun_arguments(self, processes: int) -> list[str]:
        """c10d rendezvous, whose store is on node 0 and which sees a node come, leave and come back."""
        arguments = {
            "--nnodes": self.nodes,
            "--nproc-per-node": processes,
            "--max-restarts": self.restarts,
            "--rdzv-backend": "c10d",
            "--rdzv-id": self.job,
            "--rdzv-endpoint": self.endpoint,
            "--rdzv-conf": f"is_host={int(self.rank == 0)},join_timeout={self.timeout_seconds},"
            f"read_timeout={self.timeout_seconds}",
        }
        if self.local_address:
            arguments["--local-addr"] = self.local_address
        return [str(part) for pair in arguments.items() for part in pair]


def _number(environment: Mapping[str, str], name: str, default: int, *, least: int, most: int = 10**6) -> int:
    text = environment.get(name, str(default))
    if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
        raise ConfigError(f"{name} = {text!r} is not a whole number from {least} to {most}")
    return int(text)


def processes_on(node: Node, config: Config, *, gpus: int) -> int:
    """NPROC_PER_NODE; else a process for each GPU; on a CPU what one model takes (tensor x pipeline x context)."""
    if node.processes is not None:
        return node.processes
    if gpus:
        return gpus
    parallel = config.parallel
    return -(-parallel.tensor * parallel.pipeline * parallel.context // node.nodes)


def prepare(environment: MutableMapping[str, str], node: Node, processes: int, *, gpus: int) -> None:
    """Set what the workers need and the user did not."""
    if environment.pop("LORA_MEGATRON_QUIET_AGENT", None):  # torchrun.sh: torch's C++ warnings are for workers only
        environment.pop("TORCH_CPP_LOG_LEVEL", None)
    # Without it a restarted attempt reads the keys of the one that died.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment.setdefault("OMP_NUM_THREADS", str(max(1, min(cores // processes, _MOST_THREADS))))
    if gpus >= processes:
        return
    if sys.platform == "linux":
        # glibc would hand large blocks back to the kernel and take them anew in every step, zeroed page by page.
        for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
            environment.setdefault(name, str(2**32))
        if node.local_address == LOOPBACK:
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine's own name may resolve to nothing


def main(argv: Sequence[str] | None = None) -> int:
    """Run this node's workers to their end; their exit status, or that of why they could not start."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for number in FORWARDED:
        signal.signal(number, _leave)  # until there are workers to hand it on to
    try:
        return _launch(arguments)
    except UserError as error:
        return _fail(str(error), error.exit_status)
    except SignalException:
        return EXIT_PREEMPTED


def _leave(number: int, frame: FrameType | None) -> None:
    raise SignalException("told to stop before the start", signal.Signals(number))


def _launch(arguments: list[str]) -> int:
    if len(arguments) < 2 or arguments[0] not in COMMANDS:
        raise ConfigError(f"COMMAND is one of {', '.join(COMMANDS)}, and CONFIG is to follow: see torchrun.sh --help")
    command, path, *rest = arguments
    overrides = rest[: next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))]
    config = load_config(path, overrides)
    node = Node.from_environment(os.environ)
    gpus = torch.cuda.device_count()
    processes = processes_on(node, config, gpus=gpus)
    prepare(os.environ, node, processes, gpus=gpus)
    _await_node_0(node)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # one line of ours instead of forty
    words = [*node.torchrun_arguments(processes), "--module", "lora_megatron", command, path, *rest]
    try:
        with patch("torch.distributed.launcher.api.LocalElasticAgent", Agent):  # torchrun has no other place for it
            torchrun.run(torchrun.parse_args(words))
    except ChildFailedError as error:
        return _status(error)
    except RendezvousTimeoutError:
        return _fail(
            f"not all of NNODES = {node.nodes} nodes met at {node.endpoint} within RDZV_TIMEOUT = "
            f"{node.timeout_seconds} s: start the others with the same RDZV_ID, or give them more time",
            EXIT_LOST_RANK,
        )
    except RendezvousConnectionError as error:
        return _no_store(node, error)
    except RendezvousError as error:
        return _fail(f"the nodes lost each other at {node.endpoint} ({_first_line(error)})", EXIT_LOST_RANK)
    return EXIT_DONE


def _await_node_0(node: Node) -> None:
    """Until something listens where the nodes meet: torch's own client says so in fifty lines when it gives up."""
    deadline = time.monotonic() + node.timeout_seconds
    while node.rank > 0:
        try:
            socket.create_connection((node.address, node.port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LostRankError(
                    f"no connection to node 0 at {node.endpoint} within RDZV_TIMEOUT = {node.timeout_seconds} s "
                    f"({error.strerror or error}): it must run, and its MASTER_PORT be reachable"
                ) from None
            time.sleep(0.5)


def _status(error: ChildFailedError) -> int:
    failures = sorted(error.failures.items())
    status = status_of_workers([failure.exitcode for _, failure in failures], signalled=Agent.signalled)
    if status in FINAL:
        return status  # the workers have said why
    ended = "; ".join(f"rank {rank} (pid {failure.pid}) {_how(failure.exitcode)}" for rank, failure in failures)
    return _fail(f"on {socket.gethostname()} {ended}: see above, or the kernel's log for a kill", status)


def _how(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
    return f"ended with status {code}"


def _no_store(node: Node, error: RendezvousConnectionError) -> int:
    reason = _first_line(error.__cause__ or error)
    if node.rank > 0:
        status = status_of_workers(Agent.exit_codes, signalled=Agent.signalled)
        return status if status in FINAL else _fail(f"lost node 0 at {node.endpoint} ({reason}): see its log", status)
    if "EADDRINUSE" in str(error.__cause__):
        return _fail(f"MASTER_PORT = {node.port} of this node is in use: choose another one on all nodes", 2)
    return _fail(f"cannot open the rendezvous at {node.endpoint} ({reason}): is it this node's MASTER_ADDR?", 2)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _fail(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())

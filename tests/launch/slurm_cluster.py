# SPDX-License-Identifier: Apache-2.0
"""A real Slurm on this machine: munged, slurmctld and a slurmd for each of two nodes, in one folder and under one roof.

Nothing outside the folder is read or written but the programs, and nothing is left running: every daemon runs in the
foreground as a child of the tests, and dies with them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
NODES = 2
PATIENCE_S = 120.0  # for anything to happen on a machine with other work
# Seconds a requeued job waits, so that no credential of its last start is good for the next.
_CREDENTIAL_S = 5
_PR_SET_PDEATHSIG = 1


def missing_programs() -> list[str]:
    """The programs of slurm-wlm and munge that are not there."""
    return [name for name in PROGRAMS if find(name) is None]


def find(name: str) -> str | None:
    """Daemons are in sbin, which is not on everybody's PATH."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def await_(condition: Callable[[], object], what: str, *, seconds: float = PATIENCE_S) -> None:
    """Until `condition()` is true; AssertionError with `what` if it never is."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain: {what}"
        time.sleep(0.1)


def _die_with_tests() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Cluster:
    """Start it with `start`, end it with `stop`. `folder` is short: sockets have paths of at most 107 bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configuration = folder / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self.configuration)}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        key, self._munge = self.folder / "munge.key", self.folder / "munge.socket"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        ports = _free_ports(1 + NODES)
        self.configuration.write_text(self._configuration(*ports), encoding="utf-8")
        for name in ("state", *(f"spool-n{node}" for node in range(1, NODES + 1))):
            (self.folder / name).mkdir()
        files = [f"--{name}-file={self.folder / f'munged.{name}'}" for name in ("pid", "log", "seed")]
        self._run("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self._munge}", *files)
        await_(self._munge.exists, "munged opens its socket")
        self._run("slurmctld", "-D", "-c", "-f", str(self.configuration))
        for node in range(1, NODES + 1):
            self._run("slurmd", "-D", "-N", f"n{node}", "-f", str(self.configuration))
        await_(lambda: self.states() == ["idle"] * NODES, "both nodes are idle")

    def _configuration(self, controller_port: int, *node_ports: int) -> str:
        host, folder = socket.gethostname().partition(".")[0], self.folder
        nodes = [
            f"NodeName=n{index} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=1000 State=UNKNOWN"
            for index, port in enumerate(node_ports, 1)
        ]
        return "\n".join(
            [
                f"ClusterName=tests\nSlurmctldHost={host}(127.0.0.1)\nSlurmctldPort={controller_port}",
                "SlurmUser=root\nSlurmdUser=root",
                f"AuthType=auth/munge\nAuthInfo=socket={self._munge},cred_expire={_CREDENTIAL_S}\nCredType=cred/munge",
                f"StateSaveLocation={folder}/state\nSlurmdSpoolDir={folder}/spool-%n",
                f"SlurmctldPidFile={folder}/slurmctld.pid\nSlurmdPidFile={folder}/slurmd-%n.pid",
                # No cgroups and no systemd: a container has neither.
                "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nMpiDefault=none\nSwitchType=switch/none",
                "JobAcctGatherType=jobacct_gather/none\nAccountingStorageType=accounting_storage/none",
                "SelectType=select/linear\nSchedulerType=sched/builtin\nSchedulerParameters=sched_interval=1",
                "SlurmdParameters=config_overrides",
                "ReturnToService=2\nMessageTimeout=60\nSlurmdTimeout=300\nKillWait=90",
                *nodes,
                "PartitionName=tests Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n",
            ]
        )

    def _run(self, name: str, *arguments: str) -> None:
        program = find(name)
        assert program is not None
        with open(self.folder / f"{name}-{len(self._daemons)}.out", "wb") as log:
            daemon = subprocess.Popen(
                [program, *arguments], stdout=log, stderr=log, env=self.environment, preexec_fn=_die_with_tests
            )
        self._daemons.append(daemon)

    def stop(self) -> None:
        """End jobs and daemons; steps, which are no children of ours, are found by the folder of their daemon."""
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["scancel", "--signal=KILL", "--full", "--state=RUNNING"], env=self.environment, timeout=10)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(3)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        await_(lambda: not self.processes(), "everything of the cluster is gone")

    def processes(self) -> list[int]:
        """Everything that has this cluster's configuration in its environment: daemons, steps, what they started."""
        found, needle = [], f"SLURM_CONF={self.configuration}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if int(folder.name) != os.getpid() and needle in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
        return found

    def ask(self, *command: str) -> str:
        """What a Slurm command prints; AssertionError with its complaint if it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def states(self) -> list[str]:
        """The state of each node; empty while the controller does not answer."""
        with contextlib.suppress(AssertionError):
            return self.ask("sinfo", "--noheader", "--Node", "--format=%t").split()
        return []

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job: JobState, Restarts, ExitCode ..."""
        pairs = (word.partition("=") for word in self.ask("scontrol", "--oneliner", "show", "job", number).split())
        return {key: value for key, _, value in pairs}

    def log(self) -> str:
        """The output of the daemons, for a failure's message."""
        return "\n".join(f"{p.name}:\n{p.read_text(errors='replace')}" for p in sorted(self.folder.glob("*.out")))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports

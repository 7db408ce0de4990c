# SPDX-License-Identifier: Apache-2.0
"""`launch/torchrun.sh` twice on one machine, as two nodes; and what it says of a node, port or value that is wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands.runs import checkpoint_of, log_of, losses_of, status_of
from tests.launch.conftest import STEPS, slow_tree, uninterrupted_losses, write_tree
from tests.launch.slurm_cluster import await_
from tests.pool import Pool

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "launch" / "torchrun.sh"
VARIABLES = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE", "RANK", "WORLD_SIZE", "COMMAND")


def start(*words: str, **variables: str) -> subprocess.Popen[str]:
    """The launcher with these variables of its own, and nothing of the surroundings' world."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.Popen(
        [str(LAUNCHER), *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@contextlib.contextmanager
def ended(processes: list[subprocess.Popen[str]]) -> Iterator[None]:
    """Nothing is left running, whatever happens within; workers die with their launcher."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def workers_of(agent: int) -> list[int]:
    """The children of an agent: its ranks."""
    return [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]


@pytest.mark.slow  # two nodes are in every run with `test_slurm`, a restart with `test_launcher`
@pytest.mark.timeout(600)
def test_two_agents_train_the_same_losses_though_a_worker_is_killed(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    tree = slow_tree(corpus, tmp_path / "run", save_every=3)  # two nodes of one process each: data parallelism
    config = write_tree(tmp_path / "run.yaml", tree)
    expected = uninterrupted_losses(pool, tree, tmp_path)
    shared = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "MAX_RESTARTS": "1"}
    shared["OMP_NUM_THREADS"] = "1"  # as those it is compared with: two threads add up in another order
    agents = [start(str(config), NODE_RANK=str(node), **shared) for node in range(2)]
    with ended(agents):
        log = tmp_path / "run" / "metrics.jsonl"
        await_(lambda: log.exists() and len(log_of(tmp_path / "run")) >= 4, "step 4", seconds=300)
        before = losses_of(tmp_path / "run")
        os.kill(workers_of(agents[1].pid)[0], signal.SIGKILL)
        outputs = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert before == {step: expected[step] for step in before}, "two nodes, as long as nothing happened"
    assert any("resumed from" in output for output in outputs), outputs
    assert [line["step"] for line in log_of(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert losses_of(tmp_path / "run") == expected, "and after the restart"


@pytest.mark.timeout(300)
def test_a_signal_to_the_launcher_saves_and_is_no_crash_to_restart_after(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = write_tree(tmp_path / "run.yaml", slow_tree(corpus, run))
    launcher = start(str(config), "train.steps=100000", MAX_RESTARTS="2")
    with ended([launcher]):
        await_((run / "metrics.jsonl").exists, "the first step")
        launcher.send_signal(signal.SIGUSR1)  # torchrun's own agent dies of it, and its workers with it
        output = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == 75, output
    status = status_of(run)
    assert (status["state"], status["signal"]) == ("preempted", "SIGUSR1")
    assert checkpoint_of(run, status["step"]).is_dir()
    assert output.splitlines()[-1].startswith("preempted: SIGUSR1 stopped the run at step"), output


def _line(words: list[str], **variables: str) -> tuple[int, str]:
    """Status and the last line of an attempt that fails; the only one, but for what a first node may warn of."""
    process = start(*words, **variables)
    with ended([process]):
        output = process.communicate(timeout=120)[0]
    assert len(output.splitlines()) == 1, output
    return process.returncode, output


def test_a_node_that_does_not_come_is_one_line(tmp_path: Path) -> None:
    config = str(write_tree(tmp_path / "run.yaml", {}))
    two = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "RDZV_TIMEOUT": "2"}
    status, output = _line([config], NODE_RANK="0", **two)
    assert status == 6
    assert "not all of NNODES = 2 nodes met at 127.0.0.1:" in output
    assert "within RDZV_TIMEOUT = 2 s" in output
    status, output = _line([config], NODE_RANK="1", **two)
    assert status == 6
    assert "no connection to node 0 at 127.0.0.1:" in output


def test_a_busy_port_is_one_line(tmp_path: Path) -> None:
    config = str(write_tree(tmp_path / "run.yaml", {}))
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = str(server.getsockname()[1])
        status, output = _line(
            [config], NNODES="2", NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RDZV_TIMEOUT="5"
        )
    assert (status, output) == (
        2,
        f"error: MASTER_PORT = {port} of this node is in use: choose another one on all nodes\n",
    )

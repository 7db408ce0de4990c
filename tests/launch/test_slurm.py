# SPDX-License-Identifier: Apache-2.0
"""The shipped batch script under a real Slurm: two nodes, interrupted twice, and the losses of a run left alone.

Continuous integration (CI=true) installs Debian's slurm-wlm and munge; elsewhere the tests skip where they are missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands.runs import log_of, losses_of, status_of
from tests.launch.conftest import STEPS, slow_tree, uninterrupted_losses, write_tree
from tests.launch.slurm_cluster import PATIENCE_S, Cluster, await_, missing_programs
from tests.pool import Pool

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "slurm" / "train.sbatch"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def _provide_slurm() -> None:
    if missing_programs() and os.environ.get("CI") == "true" and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]):
            patient = ["-o", "Acquire::Retries=3", "-o", "DPkg::Lock::Timeout=120"]
            subprocess.run(["apt-get", "-qq", *patient, *command], env=environment, check=True, timeout=600)
    if os.geteuid() != 0:
        pytest.skip("the daemons of Slurm run as root here")
    if missing := missing_programs():
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurm-wlm munge")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes; all of it is gone afterwards."""
    _provide_slurm()
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # pytest's own paths are too long for a socket
    folder.chmod(0o755)
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    except AssertionError as error:
        raise AssertionError(f"{error}\n{cluster.log()}") from error
    finally:
        cluster.stop()
        shutil.rmtree(folder)


def submit(cluster: Cluster, folder: Path, *words: str, root: Path = ROOT, **variables: str) -> str:
    """The number of a job of the shipped script; it writes to `folder`/job.out."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**cluster.environment, "LORA_MEGATRON_ROOT": str(root), "PYTHON": sys.executable, **variables}
    environment["OMP_NUM_THREADS"] = "1"  # as those they are compared with: two threads add up in another order
    options, (config, *overrides) = (
        [word for word in words if word.startswith("--")],
        [word for word in words if not word.startswith("--")],
    )
    command = ["sbatch", "--parsable", f"--output={folder}/job.out", f"--chdir={folder}", *options, str(SCRIPT), config]
    done = subprocess.run([*command, *overrides], env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def await_end(cluster: Cluster, job: str, folder: Path) -> dict[str, str]:
    """What became of a job."""
    await_(lambda: cluster.job(job)["JobState"] in ENDED, f"job {job} ends:\n{_output(folder)}", seconds=3 * PATIENCE_S)
    return cluster.job(job)


def _output(folder: Path) -> str:
    path = folder / "job.out"
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_nodes_train_the_same_losses_through_a_signal_and_a_requeue(
    cluster: Cluster, pool: Pool, corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = write_tree(tmp_path / "run.yaml", slow_tree(corpus, run))  # saves at the end only, and when it is told to
    layout = write_tree(tmp_path / "layout.yaml", {"parallel": {"tensor": 2}})
    job = submit(cluster, tmp_path, "--nodes=2", str(config), str(layout), "train.straggler_every=0")

    _await_step(run, 2, tmp_path)
    cluster.ask("scancel", "--signal=USR1", job)  # as --signal does before the time limit: to every process of the step
    await_(lambda: cluster.job(job)["Restarts"] == "1", f"the job goes back into the queue:\n{_output(tmp_path)}")
    first = status_of(run)
    assert (first["state"], first["exit_status"]) == ("preempted", 75)

    _await_step(run, first["step"] + 1, tmp_path)
    cluster.ask("scontrol", "requeue", job)  # as an administrator or a preempting partition does: SIGTERM
    await_(lambda: status_of(run)["state"] == "preempted", f"the run saves once more:\n{_output(tmp_path)}")
    assert status_of(run)["step"] < STEPS, "the job was interrupted too late to prove anything"

    ended = await_end(cluster, job, tmp_path)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "2"), _output(tmp_path)
    assert _output(tmp_path).count("resumed from") == 2
    assert [line["step"] for line in log_of(run)] == list(range(1, STEPS + 1))
    tree = slow_tree(corpus, run, tensor=2)
    assert losses_of(run) == uninterrupted_losses(pool, tree, tmp_path)


def _await_step(run: Path, step: int, folder: Path) -> None:
    """Until metrics.jsonl has this step."""
    log = run / "metrics.jsonl"
    await_(
        lambda: log.exists() and any(line["step"] >= step for line in log_of(run)),
        f"step {step}:\n{_output(folder)}",
        seconds=2 * PATIENCE_S,
    )


def test_a_job_that_fails_is_not_put_back(cluster: Cluster, tmp_path: Path) -> None:
    config = write_tree(tmp_path / "run.yaml", {"parallel": {"tensr": 2}})
    ended = await_end(cluster, submit(cluster, tmp_path, str(config)), tmp_path)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    assert "error: unknown key parallel.tensr: did you mean parallel.tensor?" in _output(tmp_path)


def _stand_in(folder: Path, body: str) -> Path:
    """A repository whose launcher does nothing but `body`, for what the batch script alone decides."""
    launcher = folder / "repository" / "launch" / "torchrun.sh"
    launcher.parent.mkdir(parents=True)
    launcher.write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
    launcher.chmod(0o755)
    return folder / "repository"


def test_a_cancelled_job_is_not_put_back_though_its_run_says_preempted(cluster: Cluster, tmp_path: Path) -> None:
    root = _stand_in(tmp_path, "trap 'exit 75' TERM; touch started; while sleep 0.1; do :; done")
    job = submit(cluster, tmp_path, "config.yaml", root=root)
    await_((tmp_path / "started").exists, "the job runs")
    cluster.ask("scancel", job)
    await_(lambda: "preempted: the job is" in _output(tmp_path), f"the script ends:\n{_output(tmp_path)}")
    ended = await_end(cluster, job, tmp_path)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")


def test_a_job_that_is_always_preempted_ends(cluster: Cluster, tmp_path: Path) -> None:
    root = _stand_in(tmp_path, "echo node $NODE_RANK of $NNODES at $MASTER_ADDR:$MASTER_PORT $RDZV_ID: $*; exit 75")
    job = submit(cluster, tmp_path, "--nodes=2", "a.yaml", "train.steps=3", root=root, MAX_REQUEUES="1")
    ended = await_end(cluster, job, tmp_path)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "75:0", "1")
    port = 10000 + int(job)
    for start in (0, 1):
        for node in (0, 1):
            words = "a.yaml run.resume=auto run.grace_seconds=120 train.steps=3"
            line = f"node {node} of 2 at 127.0.0.1:{port} slurm-{job}-{start}: {words}"
            assert line in _output(tmp_path)
    assert "MAX_REQUEUES" in _output(tmp_path)

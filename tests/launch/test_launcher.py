# SPDX-License-Identifier: Apache-2.0
"""What the launcher makes of its environment, of its workers' statuses, and of a script called wrongly."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException

from lora_megatron.commands.launch import Node, main, prepare, processes_on
from lora_megatron.config import parse_config
from lora_megatron.errors import ConfigError
from lora_megatron.parallel.agent import Agent, status_of_workers

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "launch" / "torchrun.sh"
TINY = str(ROOT / "launch" / "configs" / "tiny.yaml")
SCRIPTS = (LAUNCHER, ROOT / "launch" / "slurm" / "train.sbatch")
TWO = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"NNODES": "two"}, "NNODES = 'two' is not a whole number from 1"),
        ({"NNODES": "0"}, "NNODES = '0' is not a whole number from 1"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "NNODES = 2 needs MASTER_ADDR"),
        ({"NNODES": "2", "MASTER_ADDR": "n1"}, "NNODES = 2 needs NODE_RANK"),
        ({**TWO, "NODE_RANK": "2"}, "NODE_RANK = 2 with NNODES = 2: nodes count from 0 to 1"),
        ({**TWO, "NODE_RANK": "-1"}, "NODE_RANK = '-1' is not"),
        ({**TWO, "MASTER_PORT": "70000"}, "MASTER_PORT = '70000' is not a whole number from 1 to 65535"),
        ({"NPROC_PER_NODE": "gpu"}, "NPROC_PER_NODE = 'gpu' is not"),
        ({"MAX_RESTARTS": "1.5"}, "MAX_RESTARTS = '1.5' is not"),
    ],
)
def test_a_variable_that_is_wrong_is_named(environment: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match="^" + said.replace("(", r"\(")):
        Node.from_environment(environment)


def test_nodes_meet_at_node_0_and_a_single_one_at_home() -> None:
    arguments = Node.from_environment({**TWO, "RDZV_ID": "job-7", "MAX_RESTARTS": "3"}).torchrun_arguments(8)
    pairs = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert pairs["--rdzv-endpoint"] == "10.0.0.1:29500"
    assert (pairs["--nnodes"], pairs["--nproc-per-node"], pairs["--max-restarts"]) == ("2", "8", "3")
    assert (pairs["--rdzv-id"], pairs["--rdzv-backend"]) == ("job-7", "c10d")
    assert pairs["--rdzv-conf"].startswith("is_host=0,")
    assert "--local-addr" not in pairs
    alone = Node.from_environment({"MASTER_ADDR": "left.over", "MASTER_PORT": "1"})
    assert (alone.endpoint, alone.local_address) == ("127.0.0.1:0", "127.0.0.1")


def test_processes_are_one_a_gpu_or_what_a_model_needs() -> None:
    config = parse_config({"parallel": {"tensor": 2, "pipeline": 3}})
    one, two = Node.from_environment({}), Node.from_environment(TWO)
    assert processes_on(one, config, gpus=8) == 8
    assert processes_on(one, config, gpus=0) == 6
    assert processes_on(two, config, gpus=0) == 3
    assert processes_on(Node.from_environment({"NPROC_PER_NODE": "4"}), config, gpus=8) == 4


def test_workers_get_what_they_need_and_what_the_user_set_stays() -> None:
    environment = {"OMP_NUM_THREADS": "7", "TORCH_CPP_LOG_LEVEL": "FATAL", "LORA_MEGATRON_QUIET_AGENT": "1"}
    prepare(environment, Node.from_environment({}), 2, gpus=0)
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert environment["OMP_NUM_THREADS"] == "7"
    assert "TORCH_CPP_LOG_LEVEL" not in environment
    assert environment.get("GLOO_SOCKET_IFNAME") == "lo"
    on_gpus = {"TORCH_CPP_LOG_LEVEL": "INFO"}
    prepare(on_gpus, Node.from_environment(TWO), 1, gpus=1)
    assert on_gpus["TORCH_CPP_LOG_LEVEL"] == "INFO"
    assert "GLOO_SOCKET_IFNAME" not in on_gpus
    assert int(on_gpus["OMP_NUM_THREADS"]) == min(len(os.sched_getaffinity(0)), 16)


@pytest.mark.parametrize(
    ("codes", "signalled", "status"),
    [
        ([75, 75], True, 75),
        ([-signal.SIGTERM, 4], False, 4),  # the one that failed, and one that the agent stopped
        ([-signal.SIGKILL, 6], False, 6),
        ([-signal.SIGKILL], False, 128 + 9),
        ([-signal.SIGUSR1, -signal.SIGUSR1], True, 75),  # before they listened
        ([-signal.SIGUSR1, 6], True, 75),  # the second lost the first, which did not listen yet
        ([-signal.SIGUSR1], False, 128 + signal.SIGUSR1),
        ([-signal.SIGKILL, -signal.SIGUSR1], True, 128 + 9),
        ([1], False, 1),
        ([], False, 6),
    ],
)
def test_the_status_is_that_of_the_workers(codes: list[int], signalled: bool, status: int) -> None:
    assert status_of_workers(codes, signalled=signalled) == status


def test_a_command_that_cannot_be_launched_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        assert main(["merge", "a.yaml"]) == 2
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert capsys.readouterr().err == (
        "error: COMMAND is one of train, bench, generate, evaluate, and CONFIG is to follow: see torchrun.sh --help\n"
    )


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        ([], {}, "error: no CONFIG given"),
        (["missing.yaml"], {}, "error: cannot read configuration missing.yaml"),
        (
            [str(ROOT / "launch/configs/tiny.yaml")],
            {"PYTHON": "no-such-python"},
            "error: no interpreter no-such-python",
        ),
        ([TINY], {"PYTHON": "false"}, "error: false has no torch"),
    ],
)
def test_the_script_says_in_one_line_what_is_missing(words: list[str], variables: dict[str, str], said: str) -> None:
    done = subprocess.run(
        [str(LAUNCHER), *words], env={**os.environ, **variables}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1


def test_help_names_every_variable_that_is_read() -> None:
    help_text = subprocess.run([str(LAUNCHER), "--help"], capture_output=True, text=True, timeout=60, check=True).stdout
    source = (ROOT / "lora_megatron" / "commands" / "launch.py").read_text(encoding="utf-8")
    read = set(re.findall(r'environment(?:\.get\(|\[|, )"([A-Z_]+)"', source))
    assert {"NNODES", "MASTER_ADDR", "LOCAL_ADDR", "RDZV_ID"} <= read, "the pattern has lost its object"
    assert [name for name in sorted(read) if name not in help_text and not name.startswith("TORCH_")] == []
    assert "75 preempted" in help_text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_and_know_no_site(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    site = ("/home/", "/scratch", "/mnt/", "module load", "#SBATCH --partition", "#SBATCH --account")
    assert [part for part in site if part in text] == []
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
    if checker := shutil.which("shellcheck"):
        done = subprocess.run([checker, "-s", "bash", str(script)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout


def test_a_signal_between_two_starts_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that are started after it would never hear of it."""
    agent = object.__new__(Agent)
    agent._stop_if_signalled()
    monkeypatch.setattr(Agent, "signalled", True)
    with pytest.raises(SignalException):
        agent._rendezvous(object())  # type: ignore[arg-type]  # never looked at


def test_every_command_of_several_ranks_is_handed_to_torchrun_with_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout in the overrides says how many processes; options may follow."""
    seen: list[list[str]] = []
    monkeypatch.setattr("lora_megatron.commands.launch.torchrun.run", lambda parsed: seen.append(parsed))
    monkeypatch.setattr("lora_megatron.commands.launch.torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    config = tmp_path / "c.yaml"
    config.write_text("{}")
    words = {"evaluate": ["--task", "e2e", "--out", "o"], "generate": ["--prompt", "a b"]}
    try:
        for command, options in words.items():
            assert main([command, str(config), "parallel.tensor=2", *options]) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for parsed, (command, options) in zip(seen, words.items(), strict=True):
        assert parsed.nproc_per_node == "2"  # type: ignore[attr-defined]
        wanted = [command, str(config), "parallel.tensor=2", *options]
        assert [parsed.training_script, *parsed.training_script_args] == ["lora_megatron", *wanted]  # type: ignore[attr-defined]

# SPDX-License-Identifier: Apache-2.0
"""What can be found before a run begins is found, in one line, on all ranks alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lora_megatron.commands import preflight
from lora_megatron.commands import train as command
from lora_megatron.config import parse_config
from lora_megatron.data.parquet import ExampleTable
from lora_megatron.errors import CheckpointError, ConfigError, DataError
from lora_megatron.parallel import free_memory, groups
from lora_megatron.parallel.groups import Layout
from tests.commands.runs import Outcome, Tree, attempt, make_tree, nothing_begun, status_of
from tests.pool import Pool

GIB = 2**30


def _other_code(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(preflight, "code_version", lambda: "lora-megatron of yesterday")


def _other_device(patched: pytest.MonkeyPatch) -> None:
    original = preflight._own_memory
    patched.setattr(preflight, "_own_memory", lambda plan: _with(original(plan), device="V100"))


def _little_memory(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(free_memory, "available_host_memory", lambda: 2**20)


def _with(memory: preflight.Memory, **values: Any) -> preflight.Memory:
    return preflight.Memory(**{**memory.__dict__, **values})


def _unreadable_data(patched: pytest.MonkeyPatch) -> None:
    def read(self: ExampleTable, index: int) -> Any:
        raise DataError(f"{self.path} cannot be read on this machine")

    patched.setattr(ExampleTable, "__getitem__", read)


def _wrong_sums(patched: pytest.MonkeyPatch) -> None:
    original = dist.all_reduce

    def all_reduce(tensor: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        work = original(tensor, *arguments, **named)
        if tensor.ndim == 0 and tensor.is_floating_point():
            tensor += 1
        return work

    patched.setattr(dist, "all_reduce", all_reduce)


def attempt_with(tree: Tree, fault: Callable[[pytest.MonkeyPatch], None], everywhere: bool) -> Outcome:
    """Train with the fault on rank 1, or on all."""
    with pytest.MonkeyPatch.context() as patched:
        if everywhere or dist.get_rank() == 1:
            fault(patched)
        return attempt(tree)


@pytest.mark.parametrize(
    ("fault", "everywhere", "status", "words"),
    [
        (_other_code, False, 2, "the code differs between ranks: rank 0 has 'lora-megatron 0."),
        (_other_device, False, 2, "rank 1 trains on V100, the others on cpu: give every rank the same device"),
        (_little_memory, False, 2, "and 1.00 MiB are free: `lora-megatron plan` names layouts that fit"),
        (_unreadable_data, False, 3, "train.parquet cannot be read on this machine (on rank 1)"),
        (_wrong_sums, True, 2, "the world group (ranks 0-1) adds up to 4 and not 3: its network or library is broken"),
    ],
)
def test_each_failure_is_one_line_on_all_ranks(
    pool: Pool, corpus: Path, tmp_path: Path, fault: Any, everywhere: bool, status: int, words: str
) -> None:
    run = tmp_path / "run"
    tree = make_tree(corpus, run, parallel={"tensor": 2})
    outcomes = pool.run(2, attempt_with, tree=tree, fault=fault, everywhere=everywhere)
    assert len(set(outcomes)) == 1
    assert outcomes[0].status == status
    assert words in outcomes[0].message
    assert "\n" not in outcomes[0].message
    assert nothing_begun(run)
    assert status_of(run)["exit_status"] == status


def _check_groups(layout: Layout) -> list[str]:
    groups.build_mesh(layout, seed=1)
    return preflight.check_groups()


def test_every_group_of_every_rank_is_tried(pool: Pool) -> None:
    found = pool.run(4, _check_groups, layout=Layout(tensor=2, pipeline=2))
    assert found == [["world", "tensor", "pipeline", "model", "optimizer", "embedding"]] * 4
    assert (
        pool.run(4, _check_groups, layout=Layout(tensor=2)) == [["world", "tensor", "data", "model", "optimizer"]] * 4
    )
    assert pool.run(1, _check_groups, layout=Layout()) == [["of one"]]


def test_what_was_found_is_one_line_and_takes_no_time(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = []
    original = command.preflight

    def timed(*arguments: Any) -> list[str]:
        started = time.process_time()
        found = original(*arguments)
        seconds.append(time.process_time() - started)
        return found

    monkeypatch.setattr(command, "preflight", timed)
    assert attempt(make_tree(corpus, tmp_path / "run", train={"steps": 1})) == Outcome()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("preflight")]
    assert len(lines) == 1
    for words in (": 1 x cpu, groups of one ok, memory", " planned of ", "18 + 6 rows read, checkpoints 90.0 KiB of "):
        assert words in lines[0]
    assert seconds[0] < 1.0


def memory(**values: Any) -> preflight.Memory:
    usual = {"host": "a", "device": "H100", "persistent": 50 * GIB, "allocated": 70 * GIB, "largest": "w 40 GiB"}
    return preflight.Memory(**{**usual, "free": 79 * GIB, **values})


def test_a_plan_that_fits_barely_is_warned_of_and_one_that_does_not_is_refused() -> None:
    said: list[str] = []
    assert preflight.check_memory([memory()] * 4, said.append) == "memory 70.0 GiB planned of 79.0 GiB free"
    assert said == []
    preflight.check_memory([memory(), memory(free=65 * GIB)], said.append)
    assert len(said) == 1
    assert said[0].startswith("warning: rank 1 needs about 70.0 GiB by the plan (w 40 GiB) and 65.0 GiB are free")
    with pytest.raises(ConfigError, match=r"rank 1 needs about 70\.0 GiB"):  # beyond what the plan may be off
        preflight.check_memory([memory(), memory(free=63 * GIB)], said.append)
    with pytest.raises(ConfigError, match="rank 0 needs"):  # what is held all the time is known exactly
        preflight.check_memory([memory(persistent=80 * GIB, allocated=80 * GIB)], said.append)
    assert preflight.check_memory([memory(free=None)], said.append) == "memory not known"


def test_ranks_of_a_machine_without_gpus_share_its_memory() -> None:
    ranks = [memory(device="cpu", host=host, free=100 * GIB) for host in "aab"]
    with pytest.raises(ConfigError, match=r"machine a needs about 140 GiB by the plan .* and 100 GiB are free"):
        preflight.check_memory(ranks, lambda text: None)
    assert preflight.check_memory(ranks[1:], lambda text: None) == "memory 70.0 GiB planned of 100 GiB free"


def test_a_host_that_cannot_lock_what_is_asked_of_it_is_warned_of() -> None:
    said: list[str] = []
    ranks = [preflight.Locked(host, 54 * GIB, free) for host, free in (("a", 99 * GIB), ("a", None), ("b", 60 * GIB))]
    preflight.warn_of_locked_memory(ranks, said.append)
    assert said == [
        "warning: base.transposes = host locks 108 GiB of machine a's memory, and 99.0 GiB are available: set "
        "base.transposes=group, or give the job more"
    ]
    preflight.warn_of_locked_memory([preflight.Locked("c", 54 * GIB, None)], said.append)
    assert len(said) == 1


def test_a_run_is_warned_of_what_it_locks(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "available_host_memory", lambda: 1000)
    base = {"storage": "fp8", "transposes": "host"}
    assert attempt(make_tree(corpus, tmp_path / "run", base=base, train={"steps": 1})) == Outcome()
    warnings = [line for line in capsys.readouterr().err.splitlines() if "base.transposes = host locks" in line]
    assert len(warnings) == 1
    assert "1000 B are available" in warnings[0]


def test_the_disk_must_hold_one_checkpoint_more_than_are_kept(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(make_tree(corpus, tmp_path, train={"keep_checkpoints": 4}))
    usage = type("Usage", (), {"free": 5 * GIB})
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: usage)
    assert preflight.check_disk(config, GIB) == "checkpoints 5.00 GiB of 5.00 GiB disk"
    with pytest.raises(CheckpointError, match=r"has 5.00 GiB free, and 5 checkpoints of 1.00 GiB need 5.00 GiB more"):
        preflight.check_disk(config, GIB + 1)
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000002" / "state").write_bytes(b"12345")
    assert preflight.check_disk(config, GIB + 1)  # what is there already will be deleted for what comes

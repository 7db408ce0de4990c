# SPDX-License-Identifier: Apache-2.0
"""What one host's session is told: bad input is one line and status 2, and the list names commands to give alone."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest

from launch import one_host
from launch.one_host_rows import Row
from tests.launch.test_one_host import EIGHT, TINY


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpus", "3"], "--gpus 3: the layouts need an even number of at least 2 processes"),
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
        (["--budget", "0"], "--budget 0.0: must be at least 1"),
        (["--budget", "nan"], "--budget nan: must be a finite number of at least 1"),
        (["--budget", "inf"], "--budget inf: must be a finite number of at least 1"),
        (["--proof-layers", "0"], "--proof-layers 0: must be at least 1"),
        (["--proof-layers", "10"], "--proof-layers 10: the model has 8 layers; give at most that, or leave it out"),
        (["--proof-layers", "3"], "--proof-layers 3: a proof loads its adapter into a pipeline of 2 stages"),
        (["parallel.tensor=2"], "parallel.tensor=2: the layouts set that themselves; leave it out"),
        (["model.num_layers=10", "--gpus", "4"], "10 layers do not divide among the 4 stages"),
        (["model.vocab_size=null"], "model.vocab_size is not given"),
        (["model.presett=tiny"], "unknown key model.presett: did you mean model.preset?"),
        (["--parts", "bf16-tp2,tp2"], "--parts names 'tp2': choose among bf16-tp2, fp8-tp2, full, bf16-pp2, adapter"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus = [] if "--gpus" in words else ["--gpus", "2"]
    assert one_host.main([*TINY, *gpus, "--out", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {told}"), error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_free_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for folder, told in (
        (tmp_path / "file", "is a file: choose a folder"),
        (tmp_path / "file" / "x", "cannot be used (Not a directory): choose another folder"),
        (tmp_path, "is not empty: choose a new"),
    ):
        assert one_host.main([*TINY, "--gpus", "2", "--out", str(folder)]) == 2
        assert told in capsys.readouterr().err


def test_proof_layers_that_do_not_fit_are_refused_and_all_layers_cut_where_none_were_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = ["model.num_layers=16", "--gpus", "2", "--out", str(tmp_path / "out"), "--list"]
    with patch.object(one_host, "_memory", lambda *_, **__: 4 * 2**20):
        assert one_host.main([*TINY, *huge, "--proof-layers", "10"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --proof-layers 10: by the plan they need "), error
        assert error.endswith("of a GPU with 4.00 MiB; give fewer, or leave it out\n")
        assert one_host.main([*TINY, *huge]) == 0
    assert "model.num_layers=8 parallel.tensor=2" in capsys.readouterr().out


def test_the_list_is_of_commands_that_can_be_given_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert one_host.main(["--list", "--gpus", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in lines] == [*EIGHT[:3], "adapter", *EIGHT[3:], "resume"]
    assert "base.storage=fp8 data.micro_batch_size=8 data.global_batch_size=8" in lines[1]
    assert "--layers 27 " in lines[2]
    assert all("--layers" not in line for line in [*lines[:2], *lines[3:]])
    planned = [float(line.split("(")[1].split(" s)")[0]) for line in lines]
    assert sum(planned) <= one_host.BUDGET_S
    assert Row("a", "b", 1).command("c", [], gpus=1, micro_batch=1)[-1] == "--no-ceiling"

# SPDX-License-Identifier: Apache-2.0
"""launch/goals.py: numbers of made-up reports beside their goals, rows that fail, and bad input."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from launch import adapter_tax, goals
from launch.goals_rows import GIB, ROWS, Report

LORA = {
    "method": "lora",
    "out_of_memory": None,
    "tokens_per_second_per_rank": 1100.0,
    "peak_bytes": 80 * GIB,
    "share_of_ceiling": 0.9,
    "extrapolated_from": None,
}
WHOLE = {**LORA, "share_of_ceiling": 0.93, "extrapolated_from": [2, 4]}
FULL = {**LORA, "method": "full", "tokens_per_second_per_rank": 500.0}
BENCH: Report = {"rows": [LORA, FULL], "ratios": [{"speed": 1.5}]}


def case(name: str, speed: float, held: int) -> Report:
    return {"case": name, "layers": 4, "out_of_memory": False, "tokens_per_second": speed, "activation_bytes": held}


PEFT: Report = {"rows": [case("bf16", 130.0, 50), case("fp8", 170.0, 80), case("peft", 100.0, 100)]}
SLICES = {"4": {"median": 0.01}, "12": {"median": 0.04}}
TAX: Report = {"taxes": [{"storage": "bf16", "part": "whole", "layer": {"median": 0.02}, "slices": SLICES}]}


@pytest.fixture
def measured(tmp_path: Path) -> Any:
    """Runs goals.py with a row's command replaced by one that leaves `report`, or fails."""

    def run(names: str, report: Report | None, *, status: int = 0) -> dict[str, Report]:
        def pretend(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            folder = Path(command[command.index("--out") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            if report is not None:
                (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
            return subprocess.CompletedProcess(command, status, stdout="step 1\nerror: no memory\nsome Warning\n")

        with patch.object(goals.subprocess, "run", pretend), patch.object(goals, "describe_environment", lambda: ENV):
            assert goals.main(["--out", str(tmp_path / "out"), "--rows", names]) == 0
        results = json.loads((tmp_path / "out" / "goals.json").read_text(encoding="utf-8"))["results"]
        assert "# Goals" in (tmp_path / "out" / "goals.md").read_text(encoding="utf-8")
        return {result["row"]: result for result in results}

    return run


ENV = {"devices": {"type": "cpu"}}


def met(result: Report) -> dict[str, bool]:
    return {value["what"]: value["met"] for value in result["values"]}


def test_numbers_beside_their_goals(measured: Any) -> None:
    found = measured("175b-nf4,175b-lean,slice,full,full-recomputed", BENCH)
    assert met(found["175b-nf4"]) == {"tokens/s per GPU": True, "peak, GiB per GPU": True}
    assert met(found["175b-lean"]) == {"peak, GiB over all GPUs": True}
    assert list(met(found["slice"]).values()) == [False, False]
    shares = measured("slice", {"rows": [LORA, WHOLE]})["slice"]
    assert met(shares) == {"share of the products' rate, slice": False, "the same, all layers by the slices": True}
    assert met(found["full"]) == {"LoRA over full fine-tuning": True}
    assert found["full-recomputed"]["values"][0]["value"] == pytest.approx(1100 / 500)
    peft = met(measured("peft", PEFT)["peft"])
    assert list(peft.values()) == [True, True, False, False]
    assert met(measured("tax", TAX)["tax"]) == {"bf16, whole, a layer": True, "bf16, whole, 12 layers": False}
    for row in ("tax", "tax-2gpu"):
        once, four = (
            vars(adapter_tax.parse([*ROWS[name].command[1:], "--out", "runs"])) for name in (row, f"{row}-four")
        )
        assert {name for name in once if once[name] != four[name]} == {"microbatches", "warm_up", "rounds"}
        assert (once["microbatches"], four["microbatches"]) == (1, 4)


@pytest.mark.parametrize(
    ("row", "report"),
    [
        ("175b-nf4", {"rows": [{**LORA, "out_of_memory": "out of memory"}], "ratios": []}),
        ("full", {"rows": [LORA], "ratios": []}),
        ("tax", {"taxes": [{"storage": "bf16", "part": "whole", "layer": None, "slices": SLICES}]}),
        ("peft", {"rows": [{**case("peft", 1.0, 1), "out_of_memory": True}]}),
    ],
)
def test_a_report_without_the_number_does_not_end_the_call(measured: Any, row: str, report: Report) -> None:
    found = measured(f"{row},slice", {**BENCH, **report})
    assert found[row]["values"] == []
    assert "lacks the number" in found[row]["why"]
    assert "slice" in found


def test_a_command_that_fails_says_its_error_and_an_old_report_does_not_stand_for_it(measured: Any) -> None:
    assert measured("slice", BENCH)["slice"]["values"]
    failed = measured("slice", None, status=1)["slice"]
    assert failed["values"] == []
    assert failed["why"] == "failed with status 1: error: no memory"


def test_of_a_traceback_behind_torchrun_its_own_line_is_told() -> None:
    output = """[rank0]: torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:93, unhandled cuda error
E1126 22:35 torch/distributed/elastic/multiprocessing/api.py:986] failed (exitcode: 1) local_rank: 0
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
"""
    assert "NCCL error" in goals._error_in(output)
    assert goals._error_in("") == "no output"


def test_rows_that_cannot_be_compared_say_why(measured: Any) -> None:
    found = measured("full-recomputed,175b-2gpu", BENCH)
    assert "compared with row `full`" in found["full-recomputed"]["why"]
    assert found["175b-2gpu"]["why"] == "needs 2 GPUs, here is 1"


def test_the_list_and_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert goals.main(["--list"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == list(ROWS)
    assert goals.main(["--rows", "slices"]) == 2
    assert "--rows names 'slices': choose among" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert goals.main(["--out", str(tmp_path / "file")]) == 2
    assert "is a file: choose a folder" in capsys.readouterr().err
    assert goals.main(["--out", str(tmp_path / "file" / "x")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --out ")
    assert said.endswith("/file/x cannot be used (Not a directory): choose another folder\n")
    assert said.count("\n") == 1


def test_rows_at_once_share_no_gpu(tmp_path: Path) -> None:
    names, lock = list(ROWS), threading.Lock()
    busy: set[int] = set()
    most, seen = 0, list[str]()

    def pretend(name: str, folder: Path, how: goals.How, gpus: list[int]) -> Report:
        nonlocal most
        with lock:
            assert len(gpus) == ROWS[name].gpus
            assert not busy & set(gpus), "a GPU is somebody else's"
            busy.update(gpus)
            most = max(most, len(busy))
            seen.append(name)
        time.sleep(0.01)
        with lock:
            busy.difference_update(gpus)
        return {"row": name}

    with patch.object(goals, "run_row", pretend):
        ended = [result["row"] for result in goals.at_once(names, tmp_path, goals.How("torch", ()), 4)]
    assert sorted(ended) == sorted(names) == sorted(seen)
    assert most == 4
    assert [ROWS[name].gpus for name in seen[:2]] == [2, 2]


def test_at_once_every_row_is_told_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a row that is compared with another is, whichever of them ended first."""
    told: dict[str, str] = {}
    channels: dict[str, str | None] = {}

    def pretend(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--out") + 1])
        told[folder.name], channels[folder.name] = env["CUDA_VISIBLE_DEVICES"], env.get("NCCL_MAX_NCHANNELS")
        if folder.name == "full":
            time.sleep(0.05)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(BENCH), encoding="utf-8")
        return subprocess.CompletedProcess(command, 0, stdout="")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.delenv("NCCL_MAX_NCHANNELS", raising=False)
    with (
        patch.object(goals.subprocess, "run", pretend),
        patch.object(goals, "describe_environment", lambda: ENV),
        patch.object(goals.torch.cuda, "device_count", lambda: 4),
    ):
        names = "full-recomputed,full,175b-2gpu-chunks"
        assert goals.main(["--out", str(tmp_path / "out"), "--at-once", "--rows", names]) == 0
    results = json.loads((tmp_path / "out" / "goals.json").read_text(encoding="utf-8"))["results"]
    assert told == {"175b-2gpu-chunks": "4,5", "full-recomputed": "6", "full": "7"}
    assert channels == {"175b-2gpu-chunks": "8", "full-recomputed": None, "full": None}
    assert [result["command"].startswith("NCCL_MAX_NCHANNELS=8 ") for result in results] == [False, False, True]
    assert [result["row"] for result in results] == names.split(",")
    assert all(result["values"] for result in results)
    assert [result["gpus"] for result in results] == [[2], [3], [0, 1]]
    assert "side by side" in (tmp_path / "out" / "goals.md").read_text(encoding="utf-8")


def test_the_attention_is_that_of_every_row_but_the_one_beside_peft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def listed(*more: str) -> dict[str, str]:
        assert goals.main(["--list", "--out", str(tmp_path), *more]) == 0
        return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())

    given, plain = listed("--attention", "fa4"), listed()
    assert list(given) == list(plain) == list(ROWS)
    for name, command in given.items():
        words = command.split()
        if "bench" in words:
            assert words[words.index("train.attention=fa4") - 1].endswith(".yaml")
        elif name == "peft":
            assert command == plain[name]
        else:
            assert "--attention fa4" in command
    assert not any("fa4" in command for command in plain.values())
    goals.write(tmp_path, [], ENV, "fa4")
    assert "train.attention = fa4 in all rows but peft" in (tmp_path / "goals.md").read_text(encoding="utf-8")
    goals.write(tmp_path, [], ENV, "torch")
    assert "attention" not in (tmp_path / "goals.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        goals.main(["--list", "--attention", "fa5"])
    assert "invalid choice: 'fa5'" in capsys.readouterr().err

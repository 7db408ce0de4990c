# SPDX-License-Identifier: Apache-2.0
"""What a finished run leaves behind, by name and content, and the exit status of real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lora_megatron.__main__ import main
from lora_megatron.checkpoint.folder import read_manifest
from lora_megatron.config import load_config
from tests.commands.runs import (
    Outcome,
    attempt,
    checkpoint_of,
    evaluations_of,
    log_of,
    losses_of,
    make_tree,
    names_in,
    status_of,
)

ROOT = Path(__file__).resolve().parents[2]
STEP_KEYS = ["step", "loss", "grad_norm", "lr", "tokens", "loss_tokens", "tokens_per_second_per_rank"]
STEP_KEYS += ["step_seconds", "peak_memory_bytes"]


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps, as the command leaves it."""
    folder = tmp_path_factory.mktemp("whole")
    train = {"eval_every": 3, "samples": 2}
    (folder / "config.yaml").write_text(yaml.safe_dump(make_tree(corpus, folder / "run", train=train)))
    assert main(["train", str(folder / "config.yaml"), "train.seed=5"]) == 0
    return folder / "run"


def test_the_folder_holds_what_the_contract_names(run: Path) -> None:
    assert set(names_in(run)) == {
        "adapter",
        "checkpoints",
        "config.yaml",
        "environment.json",
        "evaluations.jsonl",
        "loss.png",
        "metrics.jsonl",
        "report.html",
        "report.json",
        "report.md",
        "status.json",
        "tensorboard",
    }
    assert names_in(run / "adapter") == ["adapter_config.json", "adapter_model.safetensors", "manifest.json"]
    assert names_in(run / "checkpoints") == ["step-00000004", "step-00000006"]
    assert read_manifest(run / "adapter")["kind"] == "adapter"
    assert read_manifest(checkpoint_of(run, 6))["consumed_samples"] == 24


def test_the_resolved_configuration_repeats_the_run(run: Path, tmp_path: Path) -> None:
    config = load_config(run / "config.yaml")
    assert (config.train.seed, config.model.vocab_size, config.model.ffn_hidden_size) == (5, 258, 128)
    again = tmp_path / "again"
    tree = {**yaml.safe_load((run / "config.yaml").read_text()), "run": {"dir": str(again)}}
    assert attempt(tree) == Outcome()
    assert losses_of(again) == losses_of(run)
    tensors = Path("adapter/adapter_model.safetensors")
    assert (again / tensors).read_bytes() == (run / tensors).read_bytes()


def test_a_line_of_metrics_for_every_step(run: Path) -> None:
    steps = log_of(run)
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:
        assert list(line) == STEP_KEYS
        assert all(isinstance(line[key], int | float) for key in STEP_KEYS)
        assert line["tokens"] == 4 * 16
    assert steps[0]["lr"] == 5e-3  # one step of warm-up
    assert steps[-1]["lr"] < steps[1]["lr"]
    assert [list(line) for line in evaluations_of(run)] == [["step", "held_out_loss"]] * 3
    assert [line["step"] for line in evaluations_of(run)] == [0, 3, 6]


def test_tensorboard_reads_the_events(run: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    (path,) = (run / "tensorboard").iterdir()
    found: dict[str, list[int]] = {}
    for event in loader.EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            found.setdefault(value.tag, []).append(event.step)
    assert found["loss"] == [1, 2, 3, 4, 5, 6]
    assert found["held_out_loss"] == [0, 3, 6]


def test_environment_status_and_reports(run: Path) -> None:
    environment = json.loads((run / "environment.json").read_text())
    assert {"packages", "git", "devices", "world_size"} <= set(environment)
    assert environment["packages"]["torch"]
    status = status_of(run)
    assert (status["state"], status["step"]) == ("done", 6)
    report = json.loads((run / "report.json").read_text())
    # q 2 x (32 + 32), v 3 x (32 + 32), fc2 1 x (128 + 32), on each of 4 layers.
    assert report["trainable_parameters"] == 4 * (2 * 64 + 3 * 64 + 160)
    tensors = run / "adapter" / "adapter_model.safetensors"
    assert report["checkpoint_bytes"] == tensors.stat().st_size
    assert report["held_out_loss"]["after"] < report["held_out_loss"]["before"]
    assert len(report["samples"]) == 2
    assert len(report["train_curve"]) == 6
    text = (run / "report.md").read_text()
    assert "trainable parameters" in text
    assert "## Memory per rank" in text


def test_a_bug_is_recorded_as_a_failure_and_keeps_its_traceback(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_megatron.commands import recording
    from lora_megatron.parallel import groups

    def broken(*arguments: object, **named: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(recording, "train", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        attempt(make_tree(corpus, tmp_path / "run"))
    groups.stop()
    status = status_of(tmp_path / "run")
    assert (status["state"], status["exit_status"], status["error"]) == ("failed", 1, "a bug")


def test_the_status_of_a_process(corpus: Path, tmp_path: Path) -> None:
    """Real processes: torchrun over two ranks, of which one speaks."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make_tree(corpus, tmp_path / "run", parallel={"tensor": 2})))
    arguments = ["-m", "lora_megatron", "train", str(path), f"data.train={tmp_path}/none.parquet"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    both = subprocess.run([*torchrun, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert both.returncode == 1  # torchrun's own
    assert both.stderr.count("error: ") == 1
    assert f"error: {tmp_path}/none.parquet does not exist" in both.stderr
    assert "exitcode  : 3" in both.stderr
    assert names_in(tmp_path / "run") == ["status.json"]
    status = status_of(tmp_path / "run")
    assert (status["state"], status["exit_status"]) == ("failed", 3)
    assert status["error"] == f"{tmp_path}/none.parquet does not exist or is not a file; " + (
        "give the path of a prepared .parquet file"
    )
    assert attempt(make_tree(corpus, tmp_path / "run")) == Outcome()  # such a folder is free

# SPDX-License-Identifier: Apache-2.0
"""The quickstart: its folder, its configurations, its failures in one line, and the whole thing at two sizes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_megatron.config import load_config
from lora_megatron.errors import CheckpointError, ConfigError, DataError, UserError
from lora_megatron.measure.console import TrainingProgress
from lora_megatron.quickstart import run_quickstart
from lora_megatron.quickstart.configurations import STAGES, Settings, configurations, render
from lora_megatron.quickstart.folder import MARKER, claim
from lora_megatron.quickstart.stages import Follower, run_stage

ROOT = Path(__file__).resolve().parents[1]
SEED = 7  # the command line's default
SMALL = Settings(base_rows=60, rows=60, base_steps=4, steps=4, batch=4, samples=1)


def ignore(text: str) -> None:
    pass


def test_the_shipped_configurations_are_the_embedded_ones() -> None:
    out = Path("runs/quickstart")
    for stage, tree in configurations(out, seed=SEED, settings=Settings()).items():
        shipped = ROOT / "launch" / "configs" / f"quickstart_{stage}.yaml"
        path = Path("launch") / "configs" / shipped.name
        assert shipped.read_text(encoding="utf-8") == render(stage, tree, path), f"{shipped} is not what it should be"
        assert load_config(shipped).run.dir == f"runs/quickstart/{stage}"


def test_both_adaptations_differ_in_method_and_learning_rate_only() -> None:
    trees = configurations(Path("out"), seed=1, settings=Settings())
    lora, full = trees["lora"], trees["full"]
    assert {section for section in lora if lora[section] != full[section]} == {"method", "optimizer", "run"}
    assert lora["data"]["validation"].endswith("hotels/test.parquet")
    assert lora["parallel"] == {"tensor": 2}


def test_any_path_makes_a_valid_configuration(tmp_path: Path) -> None:
    out = tmp_path / "a: b #c 'd' [e]"
    tree = configurations(out, seed=0, settings=SMALL)["lora"]
    path = tmp_path / "lora.yaml"
    path.write_text(render("lora", tree, path), encoding="utf-8")
    assert load_config(path).run.dir == str(out / "lora")
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == tree


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis\.tex, which no quickstart wrote"):
        run_quickstart(tmp_path, SEED)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "thesis.tex").rename(tmp_path / "data")  # a name that a quickstart also uses, but without its marker
    with pytest.raises(ConfigError, match="no quickstart wrote"):
        run_quickstart(tmp_path, SEED)
    with pytest.raises(ConfigError, match="is a file"):
        run_quickstart(tmp_path / "data", SEED)
    with pytest.raises(ConfigError, match="--seed -1"):
        run_quickstart(tmp_path / "new", -1)
    assert (tmp_path / "data").read_text() == "years of work"


def test_an_earlier_quickstart_is_replaced_unless_something_was_added(tmp_path: Path) -> None:
    said: list[str] = []
    out = tmp_path / "quickstart"
    claim(out, seed=1, say=said.append)
    assert said == []
    (out / "base").mkdir()
    (out / "base" / "weights").write_text("old")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("kept")
    (out / "full").symlink_to(tmp_path / "precious")
    claim(out, seed=2, say=said.append)
    assert said == [f"replacing the earlier quickstart in {out}"]
    assert sorted(entry.name for entry in out.iterdir()) == ["configs", "logs", MARKER]
    assert json.loads((out / MARKER).read_text())["seed"] == 2
    assert (tmp_path / "precious" / "file").read_text() == "kept"
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        claim(out, seed=3, say=ignore)
    assert json.loads((out / MARKER).read_text())["seed"] == 2


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another --out"):
        run_quickstart(tmp_path / "file" / "out", SEED)


def script(folder: Path, text: str) -> list[str]:
    path = folder / "stage.py"
    path.write_text(text)
    return [sys.executable, str(path)]


@pytest.mark.parametrize(
    ("status", "recorded", "kind"),
    [(3, None, DataError), (1, 4, CheckpointError), (1, None, UserError)],
)
def test_a_stage_that_fails_for_a_named_reason_says_it(
    tmp_path: Path, status: int, recorded: int | None, kind: type[UserError]
) -> None:
    (tmp_path / "logs").mkdir()
    if recorded is not None:
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "status.json").write_text(json.dumps({"exit_status": recorded}))
    command = script(tmp_path, f"import sys; print('error: no space left'); print('noise'); sys.exit({status})")
    log = tmp_path / "logs" / "full.log"
    with pytest.raises(kind, match="no space left") as failure:
        run_stage(command, log=log, environment=os.environ)
    assert type(failure.value) is kind
    assert str(log) in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_stage_that_crashes_shows_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "base.log"
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run_stage(script(tmp_path, "1 / 0"), log=log, environment=os.environ)
    assert log.read_text().startswith("$ ")


def test_an_interrupted_stage_does_not_run_on(tmp_path: Path) -> None:
    command = script(tmp_path, "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)")
    environment = {**os.environ, "PWD": str(tmp_path)}

    def interrupt() -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise KeyboardInterrupt

    os.chdir(tmp_path)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_stage(command, log=tmp_path / "base.log", environment=environment, follow=interrupt)
    finally:
        os.chdir(ROOT)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_progress_follows_a_log_that_another_process_writes(tmp_path: Path) -> None:
    stream = io.StringIO()
    clock = iter(range(0, 1000, 10))
    with TrainingProgress(4, description="lora", stream=stream, clock=lambda: float(next(clock))) as progress:
        follow = Follower(tmp_path, progress)
        follow()
        with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8", buffering=1) as log:
            (tmp_path / "evaluations.jsonl").write_text('{"step": 0, "held_out_loss": 3.25}\n')
            log.write('{"step": 1, "loss": 2.5, "lr": 0.01, "tokens_per_second_per_rank": 500.0}\n{"step": 2, "lo')
            log.flush()
            follow()
            assert "step 2/4" not in stream.getvalue()
            log.write('ss": null, "lr": 0.01, "tokens_per_second_per_rank": null, "finite": false}\n')
            follow()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "held-out loss 3.2500 after step 0"
    assert "lora  step 1/4  loss 2.5000  lr 1.00e-02  1,000 tokens/s" in lines[1]
    assert "step 2/4  loss -" in lines[2]


def run_command(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lora_megatron", "quickstart", "--out", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    done = run_command(tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: --out ")


def test_a_small_one_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "quick start"  # a space must not matter
    run_quickstart(out, SEED, settings=SMALL)
    check_report(out)
    printed = capsys.readouterr()
    assert "trainable parameters" in printed.out
    for stage in STAGES:
        assert f"{stage}  step 4/4" in printed.err  # every training shows how far it is


@pytest.mark.slow
def test_once_more_it_gives_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run_quickstart(out, SEED, settings=SMALL)
    first = check_report(out)
    capsys.readouterr()
    run_quickstart(out, SEED, settings=SMALL)
    assert "replacing the earlier quickstart" in capsys.readouterr().err
    again = check_report(out)
    for same in ("held_out_loss", "trainable_parameters", "checkpoint_bytes", "peak_memory_bytes"):
        assert again[same] == first[same], f"{same} of two runs with one seed differs"


def check_report(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert set(report["held_out_loss"]) == {"base", "lora", "full"}
    for key in ("trainable_parameters", "checkpoint_bytes", "tokens_per_second", "peak_memory_bytes"):
        assert set(report[key]) == {"lora", "full"}
        assert all(value > 0 for value in report[key].values())
    for name in ("lora", "full"):
        memory = report["runs"][name]["memory_by_rank"]
        assert [rank["rank"] for rank in memory] == [0, 1]
        assert all(rank[kind] > 0 for rank in memory for kind in ("weights", "gradients", "optimizer", "activations"))
        assert report["runs"][name]["layout"]["tensor"] == 2
        assert report["runs"][name]["samples"]
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "| trainable parameters |" in text
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / MARKER).read_text())["state"] == "done"
    assert (out / "lora" / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    return report


def test_terminating_it_leaves_no_training_behind(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "lora_megatron", "quickstart", "--out", str(out)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not trainings(out) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert trainings(out), "no training was started in two minutes"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    deadline = time.monotonic() + 20
    while trainings(out) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert trainings(out) == []


def trainings(out: Path) -> list[int]:
    """Processes that have a configuration of `out` on their command line and train it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "train" in words and any(word.startswith(str(out)) for word in words):
            found.append(int(entry.parent.name))
    return found


@pytest.mark.slow
def test_the_whole_quickstart_keeps_its_promises(tmp_path: Path) -> None:
    out = tmp_path / "quickstart"
    done = run_command(out)
    assert done.returncode == 0, done.stderr
    report = check_report(out)
    loss = report["held_out_loss"]
    assert loss["lora"] < 0.4 * loss["base"]
    assert loss["lora"] <= 1.05 * loss["full"]
    assert report["trainable_parameters"]["lora"] < 0.1 * report["trainable_parameters"]["full"]
    assert report["peak_memory_bytes"]["lora"] < report["peak_memory_bytes"]["full"]
    assert report["checkpoint_bytes"]["lora"] < 0.1 * report["checkpoint_bytes"]["full"]

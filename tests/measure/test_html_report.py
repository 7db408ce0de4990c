# SPDX-License-Identifier: Apache-2.0
"""report.html of a run folder: whole, alone, nothing executed, nothing hidden, whatever of the folder is missing."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_megatron.__main__ import main
from lora_megatron.config import Config
from lora_megatron.measure.atomic import write_json
from lora_megatron.measure.html_page import Section, escape, paragraph, samples, write_html
from lora_megatron.measure.html_report import write_html_report
from lora_megatron.measure.memory_bars import memory_table, rank_names
from lora_megatron.measure.metrics import MetricsWriter
from lora_megatron.measure.redaction import REDACTED, redact
from lora_megatron.measure.report import write_report
from tests.measure.html_reading import Page, read_page
from tests.measure.test_report import summary

HOSTILE = '</p><script>alert(1)</script><img src=x onerror="alert(2)">&amp;"\'\x00\x1b[31m\u202e'
CHARTS = ["Loss", "Learning rate", "Gradient norm", "Tokens per second, all ranks", "Step time"]
CHARTS += ["Stragglers: a rank's own time", "Stragglers: how often a rank was the slowest", "Memory by kind and rank"]
PARTS = ["Training", "Speed", "Memory", "Generated text", "Facts", "Configuration", "Versions and devices"]
ENVIRONMENT = {
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "apex": None},
    "git": {"commit": "0123456789abcdef", "dirty": True},
    "world_size": 2,
    "devices": {"type": "cuda", "gpus": [{"name": "Card 9", "memory_bytes": 80 * 2**30}] * 2},
}


def make_run(folder: Path, *, steps: int = 200, report: dict[str, Any] | None = None) -> Path:
    """A run folder as training leaves it; without report.json unless `report` is given."""
    folder.mkdir()
    config = Config.model_validate({"parallel": {"tensor": 2}, "train": {"steps": 200}, "run": {"dir": "runs/it"}})
    (folder / "config.yaml").write_text(config.to_yaml())
    write_json(folder / "environment.json", ENVIRONMENT)
    with MetricsWriter(folder) as metrics:
        metrics.write_evaluation(0, 3.0)
        for step in range(1, steps + 1):
            metrics.write(step, line_of(step))
        metrics.write_evaluation(steps, 1.05)
    lines = [{"step": step, "busy_seconds": [0.04, 0.05], "slowest": 1} for step in range(10, steps + 1, 10)]
    (folder / "stragglers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(folder / "status.json", {"state": "done" if report else "running", "step": steps})
    if report is not None:
        write_json(folder / "report.json", report)
    return folder


def line_of(step: int, **changes: Any) -> dict[str, Any]:
    loss, seconds = 1 + 2 * math.exp(-step / 40), 0.05 + 0.001 * (step % 7)
    line = {"loss": loss, "grad_norm": 0.5, "lr": 1e-4, "tokens": 2048, "step_seconds": seconds}
    return {**line, "peak_memory_bytes": 2**20, **changes}


def page_of(folder: Path) -> Page:
    return read_page(write_html_report(folder).read_text(encoding="utf-8"))


def test_a_run_has_every_part_and_every_chart(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", report=summary()))
    assert page.headings == PARTS
    for title in CHARTS:
        chart = page.picture(title)
        assert chart.get("role") == "img"
        assert chart.findtext("desc")
    for text in (
        "lora (q 4, v 4) · 2 ranks (tensor 2) · cpu · fp32",
        "1.0500",
        "10% of 1,000",
        "You will love Aurora!",
    ):
        assert text in page.text, text
    for text in ("not installed", "2 x Card 9 (80.0 GiB)", "0123456789abcdef", "straggler_every", "20 of 20"):
        assert text in page.text, text
    assert "<strong>200</strong>" in page.source  # differs from its default
    assert "<strong>4.0" not in page.source
    assert "failed" not in page.text


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", report=summary())
    first = write_html_report(run).read_bytes()
    assert write_html_report(run).read_bytes() == first


def test_a_training_report_writes_it(tmp_path: Path) -> None:
    write_report(tmp_path, summary())
    page = read_page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.headings == PARTS
    assert "training: 2.9" in "".join(page.picture("Loss").itertext())  # without a log, the summary's curve
    assert "config.yaml is not there." in page.text
    assert "environment.json is not there." in page.text


def test_no_text_becomes_markup(tmp_path: Path) -> None:
    sample = {"context": HOSTILE, "reference": HOSTILE, "before": HOSTILE, "after": "\n\n\n"}
    run = make_run(tmp_path / "<b>run", report=summary(HOSTILE, samples=[sample], device=HOSTILE))
    (run / "config.yaml").write_text(yaml.safe_dump({"run": {HOSTILE: HOSTILE}, HOSTILE: [HOSTILE]}))
    write_json(run / "environment.json", {HOSTILE: HOSTILE, "packages": {HOSTILE: None}})
    write_json(run / "status.json", {"state": "failed", "exit_status": HOSTILE, "error": HOSTILE})
    page = page_of(run)
    assert page.text.count("<script>alert(1)</script>") > 8
    assert not {"\x00", "\x1b", "\u202e"} & set(page.source)
    assert "Training report: <b>run" in page.text
    assert "default-src 'none'" in page.source


def test_lone_surrogates_do_not_stop_a_report(tmp_path: Path) -> None:
    write_html(tmp_path, "a\ud800b", [Section("s", [paragraph("\udfff")])])
    assert "a\N{REPLACEMENT CHARACTER}b" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_long_and_empty_texts(tmp_path: Path) -> None:
    assert len(escape("x" * 100_000)) < 5000
    shown = "".join(samples([{"context": "c", "before": " \n", "after": "a\nb\n\n\n"}], {"before": "B", "after": "A"}))
    assert "<em>nothing</em>" in shown
    assert "a\nb⏎⏎⏎\n" in shown


def test_secrets_are_redacted_and_tokenizers_are_not() -> None:
    hidden = {"api_key": "a", "HF_TOKEN": "b", "myPassword": "c", "deep": [{"auth": 1}], "AWS_SECRET_ACCESS_KEY": "d"}
    assert redact(hidden) == {**dict.fromkeys(hidden, REDACTED), "deep": [{"auth": REDACTED}]}
    shown = {"tokenizer": "bytes", "loss_tokens": 5, "tokens": 3, "tokenizers": "0.2", "author": "x", "keep": True}
    assert redact(shown) == shown
    assert redact({"path": "https://me:pw@host/x?token=abc&y=1"}) == {
        "path": f"https://{REDACTED}host/x?{REDACTED}&y=1"
    }
    for secret in ("hf_abcdefghijklmnop", "ghp_0123456789abcdef", "AKIAABCDEFGHIJKLMNOP"):
        assert secret not in redact(f"read with {secret}, please")
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert redact({"commit": commit}) == {"commit": commit}


def test_a_page_shows_no_secret(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_json(run / "environment.json", {"packages": {"torch": "2"}, "variables": {"WANDB_API_KEY": "sesame"}})
    (run / "config.yaml").write_text("data: {train: 'https://user:sesame@host/x', tokenizer: bytes}\n")
    write_json(run / "status.json", {"state": "failed", "error": "cannot read https://user:sesame@host/x"})
    page = page_of(run)
    assert "sesame" not in page.source
    assert "bytes" in page.text


def test_what_is_not_finite_or_skipped_is_marked(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=49)
    with MetricsWriter(run, resumed_step=49) as metrics:
        metrics.write(50, line_of(50, loss=math.nan, grad_norm=math.inf))
        metrics.write(51, line_of(51))
        metrics.write(52, line_of(52, loss=70.0, skipped=True))
        metrics.write(53, line_of(53))
        metrics.write(60, line_of(60))
    page = page_of(run)
    loss = "".join(page.picture("Loss").itertext())
    assert "no finite value: step 50" in loss
    assert "no finite value: steps 54 to 59" in loss
    assert "update skipped: 70 nats per token" in loss
    assert "training: 70 nats per token" not in loss
    assert "no finite value: step 50" in "".join(page.picture("Gradient norm").itertext())
    assert "Steps without an update (1): 52." in page.text
    assert "A red band under a cross" in page.text


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (
            {"state": "failed", "exit_status": 5, "error": "the loss is nan"},
            "failed with exit status 5: the loss is nan",
        ),
        ({"state": "preempted"}, "was preempted: started again with run.resume=auto"),
        ({"state": "running"}, "was going on, or was killed"),
        ({}, "was going on, or was killed"),
    ],
)
def test_a_run_that_did_not_end_says_so(tmp_path: Path, status: dict[str, Any], expected: str) -> None:
    run = make_run(tmp_path / "run", steps=120)
    write_json(run / "status.json", status)
    page = page_of(run)
    assert expected in page.text
    assert "Its log has 120 of 200 steps." in page.text
    assert page.headings == [part for part in PARTS if part != "Generated text"]
    assert "Peak of rank 0 so far: 1.00 MiB" in page.text


def test_the_report_of_an_earlier_end_is_not_taken_for_this_one(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", steps=201, report=summary()))
    assert "was going on, or was killed" in page.text
    assert "You will love Aurora!" not in page.text


def test_an_empty_folder_and_torn_files_still_make_a_page(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "evaluations.jsonl", "stragglers.jsonl", "config.yaml", "environment.json"):
        (tmp_path / name).write_text('{"step": 1, "lo')
    page = page_of(tmp_path)
    assert "nothing was recorded" in "".join(page.picture("Loss").itertext())
    for path in tmp_path.iterdir():
        path.unlink()
    assert page_of(tmp_path).headings == [part for part in PARTS if part != "Generated text"]


def test_one_step_at_a_huge_speed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=0)
    with MetricsWriter(run) as metrics:
        metrics.write(1, line_of(1, tokens=10**12, step_seconds=1e-7))
    page = page_of(run)
    assert "1 value" in (page.picture("Step time").findtext("desc") or "")
    assert "10,000,000,000,000,000,000" in page.text
    for word in ("nan", "inf"):
        assert f'"{word}' not in page.source


def test_stragglers_of_many_ranks_and_of_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines = [{"step": s, "busy_seconds": [0.1] * 31 + [0.2], "slowest": 31} for s in (100, 200)]
    lines.append({"step": 150, "busy_seconds": [None] * 32, "slowest": None})
    (run / "stragglers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(run)
    assert "slowest rank: 200 ms" in "".join(page.picture("Stragglers: a rank's own time").itertext())
    assert "2 of 3" in page.text
    (run / "stragglers.jsonl").unlink()
    assert "no time of single ranks was recorded (train.straggler_every = 100)" in page_of(run).text


def test_ranks_with_the_same_memory_share_a_row() -> None:
    one = {"weights": 2**20, "gradients": 0, "optimizer": 0, "activations": 0, "peak": 2**20, "trained": 0}
    ranks = [{"rank": rank, **one} for rank in (0, 1, 2)] + [{"rank": 3, **one, "peak": 2**21, "reserved": 2**22}]
    columns, rows = memory_table({"": ranks})
    assert columns[-2:] == ["peak", "reserved"]
    assert [row[0] for row in rows] == ["ranks 0-2", "rank 3"]
    assert rows[1][-2:] == ["2.00 MiB", "4.00 MiB"]
    assert rank_names([5]) == "rank 5"
    assert rank_names([0, 2]) == "ranks 0, 2"
    assert rank_names([0, 2, 4, 6]) == "rank 0 and 3 like it"


def test_very_many_steps_are_quick_and_small(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=0)
    with open(run / "metrics.jsonl", "w", encoding="utf-8") as stream:
        for step in range(1, 40_001):
            stream.write(json.dumps({"step": step, **line_of(step)}) + "\n")
    started = time.process_time()
    path = write_html_report(run)
    assert time.process_time() - started < 8  # 1 s on an idle machine
    assert path.stat().st_size < 300_000
    read_page(path.read_text(encoding="utf-8"))


def test_the_command_makes_a_page_of_a_run_that_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", steps=5)
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert "Its log has 5 of 200 steps." in read_page((run / "report.html").read_text(encoding="utf-8")).text
    assert main(["report", str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err

# SPDX-License-Identifier: Apache-2.0
"""Reports: the contract of report.json, Markdown that cannot be broken by generated text, pictures, whole files."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from lora_megatron.measure import atomic
from lora_megatron.measure.comparison import write_comparison
from lora_megatron.measure.curves import smooth
from lora_megatron.measure.markdown import escape, layout_text, printable
from lora_megatron.measure.report import write_report
from tests.measure.html_reading import read_page


def summary(method: str = "lora", **changes: Any) -> dict[str, Any]:
    """A run of 200 steps whose loss falls from 3 to about 1."""
    share = 0.1 if method == "lora" else 1.0
    memory = {"weights": 4096, "gradients": int(4096 * share), "optimizer": int(8192 * share), "activations": 10000}
    return {
        "method": method,
        "layout": {
            "tensor": 2, "pipeline": 1, "virtual_pipeline": 1, "context": 1, "sequence": False, "data": 1
        },
        "world_size": 2,
        "device": "cpu",
        "precision": "fp32",
        "steps": 200,
        "held_out_loss": {"before": 3.0, "after": 1.05},
        "trainable_parameters": int(1000 * share),
        "total_parameters": 1000,
        "checkpoint_bytes": int(4000 * share),
        "tokens_per_second": 5000.0,
        "tokens_per_second_per_rank": 2500.0,
        "step_seconds": {"median": 0.05, "p10": 0.04, "p90": 0.07},
        "peak_memory_bytes": sum(memory.values()),
        "memory_by_rank": [{"rank": rank, **memory, "peak": sum(memory.values())} for rank in (0, 1)],
        "train_curve": [[step, 1 + 2 * math.exp(-step / 40) + 0.1 * math.sin(step * 7.0)] for step in range(1, 201)],
        "held_out_curve": [[0, 3.0], [100, 1.3], [200, 1.05]],
        "samples": [
            {
                "context": "name : Aurora | stars : five",
                "reference": "Your 5-star escape!",
                "before": "Aurora is |a| <b>place</b>\x1b[31m\n",
                "after": f"You will love Aurora! ({method})",
            }
        ],
        "wall_seconds": 42.0,
        "truncated_rows": 3,
        **changes,
    }  # fmt: skip


def strict(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    return value


def table_rows(markdown: str) -> list[list[str]]:
    """The cells of every table row, split as a Markdown reader splits them: at bars that are not escaped."""
    rows = [line.replace("\\|", "\0") for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_a_run_has_numbers_text_and_a_picture(tmp_path: Path) -> None:
    write_report(tmp_path, summary())
    assert strict(tmp_path / "report.json") == json.loads(json.dumps(summary()))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    cells = {row[0]: row[1:] for row in table_rows(text)}
    assert cells["held-out loss after (nats per token)"] == ["1.0500"]
    assert cells["trainable parameters"] == ["100 (10% of 1,000)"]
    assert cells["layout"] == ["tensor 2; ranks: 2"]
    assert cells["1"] == ["4.00 KiB", "409 B", "819 B", "9.77 KiB", "15.0 KiB"]
    assert "(loss.png)" in text
    height, width, _ = imread(tmp_path / "loss.png").shape
    assert (width, height) == (1500, 900)
    assert sorted(os.listdir(tmp_path)) == ["loss.png", "report.html", "report.json", "report.md"]


def test_a_run_that_failed_or_did_nothing_still_has_a_report(tmp_path: Path) -> None:
    broken = summary(train_curve=[[1, 2.0], [2, math.nan], [3, None]], tokens_per_second=math.inf, samples=[])
    write_report(tmp_path, broken)
    assert strict(tmp_path / "report.json")["train_curve"] == [[1, 2.0], [2, None], [3, None]]
    assert strict(tmp_path / "report.json")["tokens_per_second"] is None
    write_report(tmp_path, {"method": "lora", "steps": 0})
    assert "Training report: lora" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_peak_that_was_never_measured_is_missing(tmp_path: Path) -> None:
    kinds = {"weights": 4096, "gradients": 0, "optimizer": 0, "activations": 0, "peak": 0}
    write_report(tmp_path, summary(steps=0, peak_memory_bytes=0, memory_by_rank=[{"rank": 1, **kinds}]))
    cells = {row[0]: row[1:] for row in table_rows((tmp_path / "report.md").read_text(encoding="utf-8"))}
    assert cells["peak memory of the largest rank"] == ["-"]
    assert cells["1"] == ["4.00 KiB", "0 B", "0 B", "-", "-"]


def test_the_comparison_has_the_promised_keys(tmp_path: Path) -> None:
    full = summary("full", held_out_loss={"before": 3.0, "after": 1.0}, held_out_curve=[[0, 3.0], [9, 0.9], [10, 1.0]])
    stream = io.StringIO()
    write_comparison(tmp_path, {"lora": summary(), "full": full}, setting={"processor": "a | b"}, stream=stream)
    report = strict(tmp_path / "report.json")
    assert report["held_out_loss"] == {"base": 3.0, "lora": 1.05, "full": 1.0}
    assert report["lowest_held_out_loss"] == {"lora": 1.05, "full": 0.9}
    assert report["trainable_parameters"] == {"lora": 100, "full": 1000}
    assert report["checkpoint_bytes"] == {"lora": 400, "full": 4000}
    assert report["tokens_per_second"] == {"lora": 5000.0, "full": 5000.0}
    assert report["peak_memory_bytes"] == {"lora": 15324, "full": 26384}
    assert report["memory_bytes_by_kind"]["optimizer"] == {"lora": 819, "full": 8192}
    assert report["runs"]["lora"]["truncated_rows"] == 3
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    cells = {row[0]: row[1:] for row in table_rows(text)}
    assert cells["trainable parameters"] == ["100", "1,000", "0.1x"]
    assert cells["held-out loss after training"] == ["1.0500", "1.0000", "1.05x"]
    assert cells["processor"] == ["a \\\0 b".replace("\\\0", "\0")]
    for expected in ("trainable parameters", "1,000", "0.1x", "You will love Aurora! (full)"):
        assert expected in stream.getvalue()
        assert escape(expected) in text
    assert imread(tmp_path / "loss.png").shape[:2] == (900, 1500)
    page = read_page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.headings == ["Comparison", "Loss and memory", "Generated text", "Setting"]
    for expected in ("0.1x", "You will love Aurora! (full)", "<b>place</b>", "a | b"):
        assert expected in page.text
    assert "base, not adapted, held-out: 3 nats per token" in "".join(page.picture("Loss").itertext())
    bars = "".join(page.picture("Memory by kind and rank").itertext())
    assert "LoRA, ranks 0-1, optimizer: 819 B" in bars
    assert "full fine-tuning, ranks 0-1, optimizer: 8.00 KiB" in bars


def test_generated_text_cannot_break_a_terminal_or_a_table(tmp_path: Path) -> None:
    stream = io.StringIO()
    write_comparison(tmp_path, {"lora": summary(), "full": summary("full")}, stream=stream)
    assert "\x1b" not in stream.getvalue()
    assert "\x1b" not in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert printable("a\nb\x07") == "a⏎b�"
    assert escape("a|b <i>*c*_[d](e)`") == "a\\|b \\<i\\>\\*c\\*\\_\\[d\\](e)\\`"
    assert len(printable("x" * 5000)) < 500


def test_layouts_in_words() -> None:
    assert layout_text({"tensor": 1, "pipeline": 1, "sequence": False, "data": 1}) == "one process"
    assert layout_text({"tensor": 2, "pipeline": 4, "sequence": True, "data": 1}) == "tensor 2, pipeline 4, sequence"


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value() -> None:
    assert smooth([2.0] * 100) == pytest.approx([2.0] * 100)
    assert smooth([5.0, 1.0])[0] == pytest.approx(5.0)
    noisy = [1.0, 3.0] * 200
    assert max(abs(value - 2.0) for value in smooth(noisy)[100:]) < 0.2
    ramp = [float(step) for step in range(400)]
    assert smooth(ramp)[:390] == pytest.approx(ramp[:390])  # no lag
    assert smooth([]) == []


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    atomic.write_json(path, {"value": 1})

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        atomic.write_json(path, {"value": 2})
    assert strict(path) == {"value": 1}
    assert os.listdir(tmp_path) == ["report.json"]

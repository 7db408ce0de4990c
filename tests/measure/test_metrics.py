# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl: one strict JSON line a step, no step twice after a resume, TensorBoard only where it is installed."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lora_megatron.measure.metrics import METRICS_NAME, MetricsWriter, read_metrics


def lines(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / METRICS_NAME).read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def write(folder: Path, steps: range, *, resumed_step: int = 0, loss: float = 1.0) -> None:
    with MetricsWriter(folder, resumed_step=resumed_step) as writer:
        for step in steps:
            writer.write(step, {"loss": loss})


def test_a_line_is_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write(1, {"loss": 2.5, "tokens": 64, "note": "first"})
        assert lines(tmp_path / "run") == [{"step": 1, "loss": 2.5, "tokens": 64, "note": "first"}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_null_and_flagged(tmp_path: Path, value: float) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(3, {"loss": value, "lr": 0.1})
        writer.write(4, {"loss": 1.0, "lr": None})
    assert lines(tmp_path) == [
        {"step": 3, "loss": None, "lr": 0.1, "finite": False},
        {"step": 4, "loss": 1.0, "lr": None},
    ]


def test_a_resumed_run_repeats_no_step(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8), loss=1.0)
    with open(tmp_path / METRICS_NAME, "a", encoding="utf-8") as stream:
        stream.write('{"step": 8, "lo')  # killed in the middle of a line
    write(tmp_path, range(5, 10), resumed_step=4, loss=2.0)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 10))
    assert [line["loss"] for line in lines(tmp_path)] == [1.0] * 4 + [2.0] * 5


def test_a_fresh_run_starts_an_empty_file(tmp_path: Path) -> None:
    write(tmp_path, range(0, 4))
    write(tmp_path, range(1, 3), loss=5.0)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 5.0), (2, 5.0)]


def test_a_rank_that_is_not_enabled_writes_nothing(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run", enabled=False) as writer:
        writer.write(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_the_same_numbers_are_tensorboard_events(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2):
            writer.write(step, {"loss": step / 2, "note": "text is left out"})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 1.0)]


def test_a_missing_tensorboard_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    write(tmp_path, range(1, 3))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert not (tmp_path / "tensorboard").exists()


def test_the_reader_skips_what_is_no_metrics_line(tmp_path: Path) -> None:
    path = tmp_path / METRICS_NAME
    path.write_bytes(b'{"step": 1}\n[1]\n{"loss": 2}\n\xff\xfe\n{"step": 2}\n{"step": ')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]

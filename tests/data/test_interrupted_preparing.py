# SPDX-License-Identifier: Apache-2.0
"""Preparing as a process: killed, interrupted, on a full disk, over files of any size."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.__main__ import main
from lora_megatron.data.parquet import open_examples
from lora_megatron.errors import DataError

WORDS = "word " * 250
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
MEASURE = """
import resource, sys
from data_prep.__main__ import main
for out, raw in enumerate(("small", "small", "large")):
    assert main([sys.argv[1], "--raw", raw, "--out", f"out-{out}"]) == 0
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def texts(task: str, records: int) -> Iterator[str]:
    """A file of `task` with so many records of 2.5 kB."""
    before, between, after = ("<a>", "\n", "</a>") if task == "webnlg" else ("", "\n", "\n")
    yield before + ("mr,ref\n" if task == "e2e" else "")
    for i in range(records):
        yield between if i else ""
        if task == "jsonl":
            yield json.dumps({"prompt": f"{i} {WORDS}", "completion": WORDS})
        elif task == "e2e":
            yield f'"name[A {i // 3}], area[{WORDS}]",{i} {WORDS}'
        else:
            yield f'<entry category="Airport" eid="Id{i}" size="1"><mtriple>A | p | {WORDS}</mtriple>'
            yield f'<lex comment="good">{i} {WORDS}</lex></entry>'
    yield after


FILES = {"jsonl": "train.jsonl", "e2e": "trainset.csv", "webnlg": "train.xml"}


def write_raw(folder: Path, task: str, records: int) -> Path:
    folder.mkdir()
    with open(folder / FILES[task], "w", encoding="utf-8") as stream:
        stream.writelines(texts(task, records))
    return folder


def start(raw: Path, out: Path, *, largest_file: int | None = None) -> subprocess.Popen[str]:
    def limit() -> None:
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    command = [sys.executable, "-m", "data_prep", "jsonl", "--raw", str(raw), "--out", str(out)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, preexec_fn=limit)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_process_leaves_nothing_that_looks_whole(kind: signal.Signals, tmp_path: Path) -> None:
    raw, out = write_raw(tmp_path / "raw", "jsonl", 12_000), tmp_path / "out"
    process = start(raw, out)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in tmp_path.glob(".out.tmp-*/train.parquet")):
        assert process.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(kind)
    _, error = process.communicate(timeout=60)
    assert not out.exists()
    if kind == signal.SIGINT:
        assert process.returncode == 130
        assert error == "interrupted\n"
        assert os.listdir(tmp_path) == ["raw"]
    else:
        assert process.returncode == -kind
        (left,) = tmp_path.glob(".out.tmp-*")
        assert not (left / "manifest.json").exists()
        with pytest.raises(DataError, match="prepare the data again"):
            open_examples(left / "train.parquet")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", "jsonl", 2500)
    process = start(raw, tmp_path / "out", largest_file=9000)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "is the disk full?" in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == ["raw"]


def test_a_full_temporary_folder_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = write_raw(tmp_path / "raw", "e2e", 2000)
    monkeypatch.setattr("data_prep.disk_index.MOST_PAGES", 100)
    assert main(["e2e", "--raw", str(raw), "--out", str(tmp_path / "out")]) == 3
    assert "cannot keep an index in the temporary folder (database or disk is full)" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["raw"]


@pytest.mark.parametrize("task", ["e2e", "webnlg"])
def test_memory_of_the_process_does_not_grow_with_the_file(task: str, tmp_path: Path) -> None:
    """All of it: Python's objects, Arrow's buffers, SQLite's pages."""
    for name, records in (("small", 4000), ("large", 16_000)):
        write_raw(tmp_path / name, task, records)
    large = (tmp_path / "large" / FILES[task]).stat().st_size
    command = [sys.executable, "-c", MEASURE, task]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    _, before, after = (int(line.split()[1]) * 1024 for line in done.stdout.splitlines() if line.startswith("peak"))
    assert large > 40e6
    assert after - before < 14e6, f"{before:,} then {after:,} bytes for a file of {large:,}"

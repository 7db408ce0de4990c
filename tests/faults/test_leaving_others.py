# SPDX-License-Identifier: Apache-2.0
"""A rank that meets an exception nobody expected ends at once: what runs at exit may wait for the others for ever."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PRELUDE = """
import atexit, sys, time
atexit.register(time.sleep, 600)  # as what frees memory that another rank's stream waits for
print("said before", end="")
def fail(*_):
    raise KeyError("a bug")
"""
WAYS = {
    "a command": "import lora_megatron.__main__ as it; it._run = fail; it.main(['doctor'])",
    "a script": "from launch.side_by_side import status_of; status_of(fail)",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_of_several_leaves_at_once(way: str) -> None:
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2"}
    ended = subprocess.run(
        [sys.executable, "-c", PRELUDE + WAYS[way]], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stdout) == (1, "said before")
    assert ended.stderr.startswith("Traceback")
    assert ended.stderr.endswith("KeyError: 'a bug'\n")


def test_it_leaves_where_nobody_reads_what_it_says() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", PRELUDE + WAYS["a script"]]
    with os.fdopen(writer, "w") as nobody:
        ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=nobody, timeout=120)
    assert (ended.returncode, ended.stdout) == (1, b"said before")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world", [{}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_one_that_is_alone_ends_as_usual(way: str, world: dict[str, str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    code = PRELUDE.replace("time.sleep, 600", "print, ', and at exit'") + WAYS[way]
    ended = subprocess.run(
        [sys.executable, "-c", code], env={**environment, **world}, capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stdout) == (1, "said before, and at exit\n")
    assert ended.stderr.count("KeyError: 'a bug'") == 1

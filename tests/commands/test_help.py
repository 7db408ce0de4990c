# SPDX-License-Identifier: Apache-2.0
"""`--help` answers at once, with examples; an error of typing is found before torch is imported."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from lora_megatron.__main__ import main
from lora_megatron.arguments import build_parser

ROOT = Path(__file__).resolve().parents[2]
MOST_SECONDS = 1.5  # of processor time, which a busy machine does not stretch
WITHOUT_TORCH = """
import contextlib, io, sys
from lora_megatron.__main__ import main
texts = []
for arguments in (["--help"], ["train", "--help"], ["quickstart", "--help"], ["--version"]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main(arguments)
    texts.append(out.getvalue())
status = main(["train", sys.argv[1]])
slow = {"torch", "megatron", "numpy", "pyarrow", "matplotlib"} & set(sys.modules)
assert not slow, slow
assert status == 2, status
print("\\0".join(texts))
"""


def test_help_shows_examples_and_imports_nothing_slow(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("train: {step: 3}\n")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(bad)], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    top, train, quickstart, version = done.stdout.split("\0")
    assert "lora-megatron train config.yaml train.steps=200" in top
    assert "exit status: 0 done, 2 configuration, 3 data, 4 checkpoint" in top
    assert "example: lora-megatron train config.yaml method.targets=" in train
    assert "example: lora-megatron quickstart --out" in quickstart
    assert version.startswith("lora-megatron ")
    assert done.stderr.startswith("error: unknown key train.step: did you mean train.steps?")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < MOST_SECONDS


@pytest.mark.parametrize(
    "arguments", [[], ["tain"], ["train"], ["train", "--fast", "x.yaml"], ["quickstart", "--seed", "x"]]
)
def test_wrong_arguments_end_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_every_command_has_a_line_of_help_and_an_example() -> None:
    (commands,) = (action for action in build_parser()._actions if action.dest == "command")
    assert set(commands.choices or ()) >= {"train", "quickstart"}
    for name, parser in dict(commands.choices or {}).items():  # type: ignore[call-overload]
        assert f"lora-megatron {name}" in str(parser.epilog), name

# SPDX-License-Identifier: Apache-2.0
"""What the README says is so: its commands run, its keys and presets exist, its links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from data_prep.__main__ import build_parser
from lora_megatron.arguments import parse_arguments
from lora_megatron.config import Config, load_config
from lora_megatron.model.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_names_every_key_and_no_other() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", TEXT, re.MULTILINE))
    assert set(rows) == set(Config.model_fields)
    for section, text in rows.items():
        keys = set(Config.model_fields[section].annotation.model_fields)  # type: ignore[union-attr]  # a section class
        outside_brackets = re.sub(r"\([^()]*\)", "", text)
        assert set(re.findall(r"`(\w+)`", outside_brackets)) == keys, section


def test_presets_and_links_exist() -> None:
    named = re.findall(r"`((?:gpt[23]|llama2|tiny|mini)[\w.-]*)`", TEXT)
    assert len(named) > 5
    assert set(named) <= set(PRESETS)
    for target in re.findall(r"\]\((?!https)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target


def commands_of(section: str, *, block: int = 1) -> list[str]:
    """The lines of a section's n-th block of commands, comments off, continued lines joined."""
    text = TEXT.split(f"## {section}\n")[1].split("```bash\n")[block].split("```")[0].replace("\\\n", " ")
    return [line.partition("  #")[0].strip() for line in text.splitlines() if line.strip()]


def test_the_training_commands_run_and_agree(tmp_path: Path) -> None:
    """As printed, in order, in a folder of their own; the second training must repeat the first one's losses, and what
    it trained is generated with, evaluated and scored."""
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / ".venv").symlink_to(sys.prefix)  # what `make install` makes, and what runs this test
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    activate, *commands = commands_of("Train")
    assert activate == ". .venv/bin/activate"
    assert len(commands) == 3
    for name in ("predictions.txt", "references.txt"):
        (tmp_path / name).write_text("The Plough serves tea.\n", encoding="utf-8")
    for command in (*commands, *commands_of("Generate, evaluate, score")):
        words = f"{activate} && {command}"
        done = subprocess.run(
            words, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    losses = []
    for run in ("tiny", "tiny-tp2"):
        lines = (tmp_path / "runs" / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([line["loss"] for line in map(json.loads, lines)])
    assert len(losses[0]) == 20
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-4
    evaluated = tmp_path / "runs" / "tiny" / "e2e"
    assert len((evaluated / "predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 20
    assert json.loads((evaluated / "scores.json").read_text(encoding="utf-8"))["scores"].keys() >= {"bleu", "nist"}


def test_the_commands_for_own_data_are_commands() -> None:
    for command in commands_of("Train", block=2):
        python, minus_m, module, *words = shlex.split(command)
        assert (python, minus_m, module) == ("python", "-m", "data_prep")
        assert build_parser().parse_args(words).preparer == words[0]


def test_the_commands_of_a_cluster_are_commands() -> None:
    """They are run by the tests of planning, bench, launchers and doctor; here every word of them is understood."""
    block = TEXT.split("## On a cluster")[1].split("```bash\n")[1].split("```")[0].replace("\\\n", " ")
    lines = [shlex.split(line.partition("  #")[0]) for line in block.splitlines() if line.strip()]
    assert {words[0] for words in lines} == {"lora-megatron", "launch/torchrun.sh", "sbatch"}
    for words in lines:
        if words[0] == "lora-megatron":
            arguments = parse_arguments(words[1:])
            if arguments.command == "doctor":
                continue
            config, overrides = arguments.config, arguments.overrides
        else:
            script = next(index for index, word in enumerate(words) if word.startswith("launch/"))
            script += words[0] == "sbatch"
            config, *overrides = words[script if words[0] == "sbatch" else 1 :]
            assert (ROOT / next(word for word in words if word.startswith("launch/"))).is_file()
        files = [str(ROOT / word) if word.endswith(".yaml") else word for word in (config, *overrides)]
        load_config(files[0], files[1:])

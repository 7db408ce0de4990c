# SPDX-License-Identifier: Apache-2.0
"""The Dockerfile, read and not built: stages, pins that agree with setup.py, sources that exist, no rights."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
from pathlib import Path
from unittest.mock import patch

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = "launch/containers/constraints.txt"
Instruction = tuple[str, str]


def stages() -> dict[str, list[Instruction]]:
    """Instructions by the name of the stage, in order; continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    found: dict[str, list[Instruction]] = {}
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            found[rest.split(" AS ")[1]] = current = []
        current.append((word, rest))
    return found


STAGES = stages()
EACH = pytest.mark.parametrize("stage", STAGES)


def arguments(stage: str) -> dict[str, str]:
    """Build arguments and their defaults."""
    return {name: value.strip('"') for name, _, value in (r.partition("=") for w, r in STAGES[stage] if w == "ARG")}


def pins() -> dict[str, str]:
    """The constraints, by canonical name."""
    lines = (ROOT / CONSTRAINTS).read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def requirements() -> tuple[list[Requirement], dict[str, list[Requirement]], str]:
    """What setup.py asks for, its extras, and the Pythons it takes."""
    with patch.object(setuptools, "setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    said = setup.call_args.kwargs
    extras = {name: [Requirement(each) for each in wanted] for name, wanted in said["extras_require"].items()}
    return [Requirement(each) for each in said["install_requires"]], extras, said["python_requires"]


def test_the_default_is_the_gpu_image_and_cpu_a_target() -> None:
    assert list(STAGES) == ["cpu", "gpu"]
    assert re.fullmatch(r"python:3\.12\.\d+-slim-\w+@sha256:[0-9a-f]{64} AS cpu", STAGES["cpu"][0][1])
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3 AS gpu", STAGES["gpu"][0][1])


@EACH
def test_it_ends_as_a_user_without_rights_whom_the_doctor_has_seen(stage: str) -> None:
    words = [word for word, _ in STAGES[stage]]
    user = words.index("USER")
    assert STAGES[stage][user][1] not in ("root", "0")
    assert words.count("USER") == 1, "nobody goes back to root"
    assert ("RUN", "lora-megatron doctor") in STAGES[stage][user:], "the doctor runs as that user"


@EACH
def test_what_is_copied_exists_and_is_not_ignored(stage: str) -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = [source for word, rest in STAGES[stage] if word == "COPY" for source in rest.split()[:-1]]
    assert CONSTRAINTS in sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source == "." or source.split("/")[0] in kept, source
    assert {"lora_megatron", "data_prep", "launch", "setup.py"} <= kept
    assert not {".git", ".venv", "runs", "tests"} & kept


@EACH
def test_every_package_is_pinned_where_it_is_named(stage: str) -> None:
    for word, rest in STAGES[stage]:
        for command in re.split(r"&&", rest) if word == "RUN" else ():
            if "pip install" not in command:
                continue
            words = shlex.split(command.partition("pip install")[2])
            named = [w for w in words if not w.startswith("-") and w != "." and "/constraints.txt" not in w]
            for each in named:
                assert re.search(r"==\$\{\w+\}$|@\$\{APEX\}$|^https://", each), f"{each} is not pinned"
            assert "-c" in words or "--no-deps" in words or named, command


def test_the_pins_agree_with_setup_and_cover_it() -> None:
    wanted, extras, pythons = requirements()
    gpu, cpu, pinned = arguments("gpu"), arguments("cpu"), pins()
    assert pythons == ">=3.11"
    outside = {"torch": [cpu["TORCH"]], "megatron-core": [cpu["MEGATRON_CORE"], gpu["MEGATRON_CORE"]]}
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        for version in outside.get(name) or [pinned[name]]:
            assert version in requirement.specifier, f"{requirement} and {version}"
    assert gpu["DEEPSPEED"] in extras["deepspeed"][0].specifier
    assert gpu["DEEPSPEED"] == pinned["deepspeed"]
    assert f"torch=={cpu['TORCH']}" in (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert not {"torch", "megatron-core"} & set(pinned), "those differ between the images"
    assert re.fullmatch(r"[0-9a-f]{40}", gpu["APEX"])


def test_the_base_images_own_pins_win_in_the_gpu_image(tmp_path: Path) -> None:
    (run,) = (rest for word, rest in STAGES["gpu"] if word == "RUN" and "awk" in rest)
    base, ours = tmp_path / "base.txt", tmp_path / "ours.txt"
    base.write_text("NumPy==1.26.4\ntyping_extensions>=4 # held\npydantic-core @ file:///x\n", encoding="utf-8")
    ours.write_text("# pins\nnumpy==2.4.6\npydantic-core==2.50.5\ntyping-extensions==4.16.0\nrich==15.0.0\n")
    command = next(part for part in run.split("&&") if "awk" in part)
    command = command.replace("/etc/pip/constraint.txt", str(base)).replace(CONSTRAINTS, str(ours))
    command = command.replace("/tmp/constraints.txt", str(tmp_path / "out.txt"))
    subprocess.run(["bash", "-c", command], check=True, timeout=60)
    kept = [line for line in (tmp_path / "out.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    assert kept == ["rich==15.0.0"]

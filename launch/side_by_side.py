# SPDX-License-Identifier: Apache-2.0
"""What the side-by-side measurements of this folder share: rounds, a folder for the report, numbers of many visits.

Cases are visited in rounds, A B C A B C, each built anew and freed before the next: only one is in memory at a time,
and a device that grows warmer, and so slower, from start to end does the same to all.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_megatron.bench.slices import Line
from lora_megatron.bench.timing import spread
from lora_megatron.errors import ConfigError, LostRankError, UserError
from lora_megatron.measure.atomic import write_json, write_text
from lora_megatron.measure.markdown import escape, printable
from lora_megatron.measure.report_folder import JSON_NAME, MARKDOWN_NAME, claim_folder, require_no_file
from lora_megatron.measure.units import MISSING, show_seconds
from lora_megatron.parallel.launcher import leave_others


def names_of(text: str, valid: Sequence[str], *, flag: str) -> list[str]:
    """`a,b` -> [a, b], each valid and there once; raises ConfigError."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in valid:
            raise ConfigError(f"{flag} names {printable(name)!r}: choose among {', '.join(valid)}")
        if names.count(name) > 1:
            raise ConfigError(f"{flag} names {name} twice: list each once")
    return names


def sizes_of(text: str, *, flag: str) -> list[int]:
    """`2,4` -> [2, 4]: one number of layers, or two for a line through them; raises ConfigError."""
    parts = [part.strip() for part in text.split(",")]
    sizes = sorted({int(part) for part in parts if part.isdecimal() and len(part) < 7})
    if len(sizes) != len(parts) or len(sizes) > 2 or not sizes or sizes[0] < 1:
        raise ConfigError(f"{flag} {printable(text)!r}: give one number of layers, or two different ones such as 2,4")
    return sizes


def require_positive(options: Any, *names: str) -> None:
    """Raise ConfigError for the first option (`names` are its attributes) that is below 1, or no finite number."""
    for name in names:
        if not 1 <= (value := getattr(options, name)) < math.inf:
            what = "must be at least 1" if value < 1 else "must be a finite number of at least 1"
            raise ConfigError(f"--{name.replace('_', '-')} {value}: {what}")


@contextlib.contextmanager
def _usable(folder: Path) -> Iterator[None]:
    """Raises ConfigError where the disk refuses."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be used ({error.strerror}): choose another folder") from None


def claim(folder: Path, *, kind: str) -> None:
    """See `claim_folder`; raises ConfigError also where the disk refuses."""
    with _usable(folder):
        claim_folder(folder, kind=kind)


def make_folder(folder: Path, *, empty: bool = False) -> None:
    """Make a folder for the reports of many runs; raises ConfigError where it cannot be, or is not `empty` as asked."""
    with _usable(folder):
        require_no_file(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if empty and any(folder.iterdir()):
            raise ConfigError(f"--out {folder} is not empty: choose a new folder")


def in_rounds(cases: Sequence[Any], rounds: int, *, enabled: bool) -> Iterator[tuple[int, Any]]:
    """(round, case) for every visit, with a progress bar on stderr, or a line a visit where that is no terminal."""
    console = Console(stderr=True, soft_wrap=True, highlight=False, quiet=not enabled)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=rounds * len(cases))
        for index in range(rounds):
            for case in cases:
                text = f"round {index + 1} of {rounds}: {case}"
                bar.update(task, description=text)
                if not console.is_terminal:
                    console.print(text)
                yield index, case
                bar.advance(task)


def pooled(visits: Sequence[Sequence[float]]) -> dict[str, Any]:
    """{median, p10, p90} over the steps of all visits, and each visit's median."""
    return {
        **spread([seconds for visit in visits for seconds in visit]),
        "median_of_each_visit": [statistics.median(visit) for visit in visits],
    }


def model_section(options: Any, *, layers: int) -> dict[str, int]:
    """Of a configuration: a GPT of so many layers and of the sizes that the scripts' options give."""
    return {
        "num_layers": layers,
        "hidden_size": options.hidden,
        "num_attention_heads": options.heads,
        "max_position_embeddings": options.sequence,
        "vocab_size": options.vocabulary,
    }


def layers_text(layers: int) -> str:
    """`1 layer`, `4 layers`."""
    return f"{layers} layer{'s' if layers > 1 else ''}"


def at_layers(sizes: Sequence[int], values: Sequence[float], layers: int) -> float | None:
    """What two slices say of a model of `layers`, on the line through them; None from one slice."""
    if len(sizes) != 2:
        return None
    return Line.through((sizes[0], values[0]), (sizes[1], values[1])).at(layers)


def per_layer(sizes: Sequence[int], values: Sequence[float]) -> float | None:
    """The slope of the same line: what one more layer costs."""
    return None if len(sizes) != 2 else Line.through((sizes[0], values[0]), (sizes[1], values[1])).slope


def spread_text(seconds: Mapping[str, float]) -> str:
    """`12.3 ms to 12.9 ms`, p10 to p90."""
    return f"{show_seconds(seconds['p10'])} to {show_seconds(seconds['p90'])}" if seconds else MISSING


def command_line(script: str) -> str:
    """The command as it was given."""
    return shlex.join(["python", f"launch/{script}", *sys.argv[1:]])


def hardware_text(environment: Mapping[str, Any]) -> str:
    """`NVIDIA ..., torch 2.11.0, ...` from `measure.environment`."""
    devices = environment["devices"]
    gpus = [gpu["name"] for gpu in devices.get("gpus", ())]
    software = [f"{name} {version}" for name, version in environment["packages"].items() if version]
    return ", ".join([*(gpus or [devices.get("name") or "CPU"]), f"Python {environment['python']}", *software])


def write_report(folder: Path, report: Mapping[str, Any], lines: Sequence[str]) -> None:
    """report.json and report.md, each whole or not at all."""
    try:
        write_json(folder / JSON_NAME, dict(report))
        write_text(folder / MARKDOWN_NAME, "\n".join(lines) + "\n")
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be written ({error.strerror}): make room or choose another") from None


def notes_lines(notes: Sequence[str]) -> list[str]:
    """A Markdown list of plain text."""
    return [*(f"- {escape(note)}" for note in notes), ""]


def status_of(run: Callable[[], None]) -> int:
    """Exit status of a script: a user's error is one line on stderr, as in `lora-megatron`."""
    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    try:
        run()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or error.told_by != "main":
            console.print(f"error: {error}")
        if isinstance(error, LostRankError):
            sys.stderr.flush()
            os._exit(error.exit_status)  # nothing that waits for the others may run
        return error.exit_status
    except Exception:  # any bug: none is handled, but a rank that unwinds from it may wait for the others for ever
        leave_others()
        raise
    return 0

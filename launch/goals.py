# SPDX-License-Identifier: Apache-2.0
"""Every measurement that this project holds itself to at GPT-3's scale, in one call, each beside its goal.

    python launch/goals.py --out runs/goals                        # all rows that this machine has the GPUs for
    python launch/goals.py --out runs/goals --at-once              # likewise, as many at a time as there are GPUs for
    python launch/goals.py --out runs/goals --rows 175b-nf4,tax    # some of them
    python launch/goals.py --out runs/goals --attention fa4        # with FlashAttention 4 (train.attention)
    python launch/goals.py --list                                  # the rows and the commands behind them

A row is a `lora-megatron bench` of a configuration in launch/configs, or a script of this folder; it runs as a process
of its own, and its report lies in a folder of its name. goals.md and goals.json are written anew after each row, so a
call that is cut short leaves what was measured. A row whose command fails, or whose report lacks the number, says so;
ROW.log has what a command printed that failed. The exit status is 0 whatever was met: goals.json tells.

With --at-once each row has GPUs of its own, those of several GPUs go first, and all share the host's processors.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch

from launch.goals_rows import ROWS, Report, Row, with_attention
from launch.side_by_side import make_folder, names_of
from lora_megatron.errors import EXIT_DONE, ConfigError
from lora_megatron.measure.atomic import write_json, write_text
from lora_megatron.measure.environment import describe_environment
from lora_megatron.measure.markdown import table

COMPARE = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class How:
    """What is changed in the command of every row: train.attention, and arguments that are added."""

    attention: str
    shrink: tuple[str, ...]


def command_of(row: Row, folder: Path, attention: str) -> list[str]:
    start = [sys.executable]
    if row.gpus > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(row.gpus)]
    return [*start, *with_attention(row.command, attention), "--out", str(folder)]


def shown(name: str, command: Sequence[str]) -> str:
    """As one would type it."""
    return shlex.join([*(f"{key}={value}" for key, value in ROWS[name].variables), *command])


def run_row(name: str, folder: Path, how: How, gpus: Sequence[int] | None = None) -> Report:
    """Run a row, on these of the GPUs that this process sees or on all of them; how it ended, and why it failed."""
    command, started = [*command_of(ROWS[name], folder / name, how.attention), *how.shrink], time.monotonic()
    print(f"{name} ...", file=sys.stderr, flush=True)
    environment = {**os.environ, **dict(ROWS[name].variables)}
    if gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = _visible(gpus)
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env=environment,
    )  # fmt: skip
    result = _result(name, shown(name, command), seconds=time.monotonic() - started)
    result["gpus"] = None if gpus is None else list(gpus)
    if done.returncode != EXIT_DONE:
        result["why"] = f"failed with status {done.returncode}: {_error_in(done.stdout)}"
        write_text(folder / f"{name}.log", done.stdout)
    return result


def _error_in(output: str) -> str:
    """The line that says why a command failed: its own, or the last of a traceback, before what torchrun says of it."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and "arning" not in line] or ["no output"]
    own = [
        line for line in lines if not any(word in line for word in ("ChildFailedError", "error_file", "traceback :"))
    ]
    told = [line for line in own if "error:" in line.lower()] or [line for line in own if "error" in line.lower()]
    return (told or own or lines)[-1]


def _result(name: str, command: str = "", *, seconds: float = 0.0, why: str = "") -> Report:
    return {"row": name, "command": command, "seconds": seconds, "values": [], "why": why}


def _visible(gpus: Sequence[int]) -> str:
    """Those of the GPUs that this process was given."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = None if given is None else given.split(",")
    return ",".join(str(gpu) if names is None else names[gpu] for gpu in gpus)


def judged(result: Report, folder: Path) -> Report:
    """The values of a row that did not fail, each beside its goal, or why there are none."""
    if result["why"]:
        return result
    name, why, values = result["row"], "", []
    report = json.loads((folder / name / "report.json").read_text(encoding="utf-8"))
    report["folder"] = str(folder / name)
    try:
        found = ROWS[name].values(report)
    except (IndexError, KeyError, TypeError):
        found, why = [], "its report lacks the number (out of memory, or too noisy a time): see its report.md"
    if not found and not why:
        why = "compared with row `full` of the same folder, which is not there"
    for what, value, sign, goal in found:
        kept = COMPARE[sign](value, goal)
        values.append({"what": what, "value": value, "sign": sign, "goal": goal, "met": kept})
    return {**result, "values": values, "why": why}


def one_by_one(names: Sequence[str], folder: Path, how: How) -> Iterator[Report]:
    for name in names:
        yield run_row(name, folder, how)


def at_once(names: Sequence[str], folder: Path, how: How, gpus: int) -> Iterator[Report]:
    """As many rows at a time as there are GPUs for, each on its own; in the order in which they end."""
    waiting = sorted(names, key=lambda name: -ROWS[name].gpus)
    free, running = list(range(gpus)), dict[Future[Report], list[int]]()
    with ThreadPoolExecutor(max_workers=gpus) as threads:
        while waiting or running:
            for name in [*waiting]:
                if ROWS[name].gpus <= len(free):
                    waiting.remove(name)
                    taken, free = free[: ROWS[name].gpus], free[ROWS[name].gpus :]
                    running[threads.submit(run_row, name, folder, how, taken)] = taken
            for ended in wait(running, return_when=FIRST_COMPLETED).done:
                free = sorted(free + running.pop(ended))
                yield ended.result()


def write(folder: Path, results: Sequence[Report], environment: Report, attention: str) -> None:
    write_json(folder / "goals.json", {"results": list(results), "environment": environment})
    rows = []
    for result in results:
        rows += [
            [
                result["row"],
                v["what"],
                f"{v['value']:,.4g}",
                f"{v['sign']} {v['goal']:g}",
                "met" if v["met"] else "missed",
            ]
            for v in result["values"]
        ] or [[result["row"], result["why"], "-", "-", "not measured"]]
    names = ", ".join(gpu["name"] for gpu in environment["devices"].get("gpus", [])) or environment["devices"]["type"]
    beside = any(result.get("gpus") is not None for result in results)
    how = " Rows side by side, each on GPUs of its own (--at-once)." if beside else ""
    how += f" train.attention = {attention} in all rows but peft." if attention != "torch" else ""
    lines = ["# Goals", "", f"On {names}.{how}", "", *table(["row", "what", "value", "goal", ""], rows)]
    write_text(folder / "goals.md", "\n".join(lines))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/goals"), help="folder to write (default: %(default)s)")
    parser.add_argument("--rows", default=",".join(ROWS), help="names from --list (default: all)")
    parser.add_argument("--at-once", action="store_true", help="as many rows at a time as there are GPUs for")
    parser.add_argument(
        "--attention", choices=("torch", "fa4"), default="torch", help="train.attention of all rows but peft"
    )
    parser.add_argument("--list", action="store_true", help="print the rows and their commands")
    parser.add_argument("--shrink", default="", help="arguments added to every command, to try the script on a CPU")
    options = parser.parse_args(arguments)
    if options.list:
        for name, row in ROWS.items():
            print(f"{name}: {shown(name, command_of(row, options.out / name, options.attention))}")
        return EXIT_DONE
    try:
        names = names_of(options.rows, list(ROWS), flag="--rows")
        make_folder(options.out)
        for name in names:
            if (options.out / name).is_file():
                raise ConfigError(f"--out {options.out}: {name} in it is a file, and a row's folder is to go there")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    for name in names:  # an earlier call's must not stand for a row that fails now
        (options.out / name / "report.json").unlink(missing_ok=True)
    environment, here = describe_environment(), max(1, torch.cuda.device_count())
    how = How(options.attention, tuple(shlex.split(options.shrink)))
    possible = [name for name in names if ROWS[name].gpus <= here]
    impossible = [name for name in names if ROWS[name].gpus > here]
    results = [_result(name, why=f"needs {ROWS[name].gpus} GPUs, here is {here}") for name in impossible]
    measuring = at_once(possible, options.out, how, here) if options.at_once else None
    for result in measuring or one_by_one(possible, options.out, how):
        results.append(result)
        results.sort(key=lambda each: names.index(each["row"]))
        write(options.out, [judged(each, options.out) for each in results], environment, how.attention)
    if not possible:
        write(options.out, results, environment, how.attention)
    print((options.out / "goals.md").read_text(encoding="utf-8"))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())

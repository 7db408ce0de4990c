# SPDX-License-Identifier: Apache-2.0
"""Every measurement that this project holds itself to at GPT-3's scale, in one call, each beside its goal.

    python launch/goals.py --out runs/goals                        # all rows that this machine has the GPUs for
    python launch/goals.py --out runs/goals --rows 175b-nf4,tax    # some of them
    python launch/goals.py --list                                  # the rows and the commands behind them

A row is a `lora-megatron bench` of a configuration in launch/configs, or a script of this folder; it runs as a process
of its own, and its report lies in a folder of its name. goals.md and goals.json are written anew after each row, so a
call that is cut short leaves what was measured. A row whose command fails, or whose report lacks the number, says so.
The exit status is 0 whatever was met: goals.json tells.
"""

from __future__ import annotations

import argparse
import json
import operator
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch

from launch.side_by_side import make_folder, names_of
from lora_megatron.errors import EXIT_DONE, ConfigError
from lora_megatron.measure.atomic import write_json, write_text
from lora_megatron.measure.environment import describe_environment
from lora_megatron.measure.markdown import table

CONFIGS = ROOT / "launch" / "configs"
GIB = 2**30
Report = dict[str, Any]
Value = tuple[str, float, str, float]
"""What, its value, `>=` or `<=`, and the goal."""
COMPARE = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Row:
    """One measurement: what runs on how many GPUs, and which numbers of its report have goals."""

    command: tuple[str, ...]
    values: Callable[[Report], list[Value]]
    gpus: int = 1


def bench(
    config: str,
    *more: str,
    layers: int,
    methods: str = "lora",
    visits: int = 1,
    steps: int = 6,
    warm_up: int = 2,
) -> tuple[str, ...]:
    """The arguments of a `lora-megatron bench`; a step is one microbatch unless `more` says otherwise."""
    fixed = ("--methods", methods, "--layers", str(layers), "--visits", str(visits), "--steps", str(steps))
    path = str((CONFIGS / f"{config}.yaml").relative_to(ROOT))
    return ("-m", "lora_megatron", "bench", path, "data.global_batch_size=1", *more, *fixed, "--warm-up", str(warm_up))


def last_row(report: Report, method: str = "lora") -> Report:
    """Of the whole model, measured or from slices."""
    return [row for row in report["rows"] if row["method"] == method and not row["out_of_memory"]][-1]


def speed(goal: float, peak_gib: float | None = None) -> Callable[[Report], list[Value]]:
    """tokens/s per GPU, and the peak."""

    def values(report: Report) -> list[Value]:
        row = last_row(report)
        found: list[Value] = [("tokens/s per GPU", row["tokens_per_second_per_rank"], ">=", goal)]
        if peak_gib is not None:
            found.append(("peak, GiB per GPU", row["peak_bytes"] / GIB, "<=", peak_gib))
        return found

    return values


def lean(goal: float, gpus: int) -> Callable[[Report], list[Value]]:
    return lambda report: [("peak, GiB over all GPUs", gpus * last_row(report)["peak_bytes"] / GIB, "<=", goal)]


def share(report: Report) -> list[Value]:
    """Of the largest slice that was measured, with head and loss, and of the whole model that the slices speak of."""
    measured = [row for row in report["rows"] if not row["extrapolated_from"] and not row["out_of_memory"]]
    return [
        ("share of the products' rate, slice", measured[-1]["share_of_ceiling"], ">=", 0.92),
        ("the same, all layers by the slices", last_row(report)["share_of_ceiling"], ">=", 0.92),
    ]


def ratio(goal: float) -> Callable[[Report], list[Value]]:
    return lambda report: [("LoRA over full fine-tuning", report["ratios"][-1]["speed"], ">=", goal)]


def best_regimes(report: Report) -> list[Value]:
    """Full fine-tuning with recomputation, without which no such model fits, against the LoRA of row `full`."""
    other = Path(report["folder"]).parent / "full" / "report.json"
    if not other.is_file():
        return []
    lora = last_row(json.loads(other.read_text(encoding="utf-8")))["tokens_per_second_per_rank"]
    return [("LoRA over full with recompute", lora / last_row(report, "full")["tokens_per_second_per_rank"], ">=", 1.9)]


def rivals(report: Report) -> list[Value]:
    rows = {row["case"]: row for row in report["rows"] if row["layers"] == 4 and not row["out_of_memory"]}
    peft, found = rows["peft"], []
    for case, goal in (("bf16", 1.2), ("fp8", 1.8)):
        found.append(
            (f"speed over PEFT, {case}", rows[case]["tokens_per_second"] / peft["tokens_per_second"], ">=", goal)
        )
        held = rows[case]["activation_bytes"] / peft["activation_bytes"]
        found.append((f"activations over PEFT's, {case}", held, "<=", 0.7))
    return found


def tax(report: Report) -> list[Value]:
    goals = {"bf16": 0.03, "fp8": 0.05}
    return [
        (f"{row['storage']}, {row['part']}, a layer", row["layer"]["median"], "<=", goals[row["storage"]])
        for row in report["taxes"]
    ]


ONE, TWO, LLAMA = "gpt3_175b_1gpu", "gpt3_175b_2gpu", "llama2_70b_1gpu"
BF16 = ("base.storage=null", "base.gemm=null", "train.recompute=none")
LEAN = ("train.recompute=full", "train.recompute_unit=3")
TENSOR = ("parallel.pipeline=1", "parallel.tensor=2", "parallel.sequence=true", "parallel.tp_comm_overlap=true")
CHUNKS = ("parallel.virtual_pipeline=24", "base.transposes=group")
GRAPH = "train.cuda_graph=true"
PAIRS = ("data.micro_batch_size=2", "data.global_batch_size=4")
BATCH_4 = ("data.micro_batch_size=4", "data.global_batch_size=16")
SPARE_4_GIB = 135.0
"""Of an H200's 139."""
ROWS = {
    "175b-nf4": Row(bench(ONE, layers=96), speed(1000, SPARE_4_GIB)),
    "175b-nf4-bf16": Row(bench(ONE, "base.gemm=bf16", layers=96), speed(750, SPARE_4_GIB)),
    "175b-lean": Row(bench(ONE, *LEAN, layers=96, steps=3), lean(90, 1)),
    "llama2-70b-fp8": Row(bench(LLAMA, layers=80), speed(2650)),
    "llama2-70b-nf4": Row(bench(LLAMA, "base.storage=nf4", "base.gemm=fp8", layers=80), speed(2650)),
    "slice": Row(bench(ONE, *BF16, *BATCH_4[:1], "data.global_batch_size=4", layers=16, visits=2), share),
    "full": Row(bench(ONE, *BF16, *BATCH_4, layers=2, methods="lora,full", visits=2), ratio(1.47)),
    "full-recomputed": Row(
        bench(ONE, *BF16[:2], "train.recompute=full", *BATCH_4, layers=2, methods="full", visits=2), best_regimes
    ),
    "peft": Row(("launch/bench_peft.py", "--layers", "4", "--steps", "8", "--rounds", "2"), rivals),
    "tax": Row(("launch/adapter_tax.py", "--cuda-graph", "--steps", "10", "--rounds", "3"), tax),
    "175b-2gpu": Row(
        bench(TWO, "data.global_batch_size=32", layers=96, steps=2, warm_up=1), speed(1500, SPARE_4_GIB), gpus=2
    ),
    "175b-2gpu-chunks": Row(
        bench(TWO, *CHUNKS, "data.global_batch_size=32", layers=96, steps=2, warm_up=1),
        speed(1500, SPARE_4_GIB),
        gpus=2,
    ),
    "175b-2gpu-tensor": Row(bench(TWO, *TENSOR, *PAIRS, GRAPH, layers=96, steps=4), speed(1500, SPARE_4_GIB), gpus=2),
    "175b-2gpu-lean": Row(bench(TWO, *TENSOR, *LEAN, layers=96, steps=3), lean(174, 2), gpus=2),
    "tax-2gpu": Row(("launch/adapter_tax.py", "--cuda-graph", "--tensor", "2", "--sequence-parallel"), tax, gpus=2),
}


def command_of(row: Row, folder: Path) -> list[str]:
    start = [sys.executable]
    if row.gpus > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(row.gpus)]
    return [*start, *row.command, "--out", str(folder)]


def measure(name: str, folder: Path, *, shrink: Sequence[str]) -> Report:
    """Run a row; its values, or why there are none."""
    row, started = ROWS[name], time.monotonic()
    command = [*command_of(row, folder / name), *shrink]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    seconds = time.monotonic() - started
    result: Report = {"row": name, "command": shlex.join(command), "seconds": seconds, "values": [], "why": ""}
    if done.returncode != EXIT_DONE:
        lines = [line for line in done.stdout.splitlines() if line.strip() and "arning" not in line] or ["no output"]
        told = [line for line in lines if "error" in line.lower()] or lines
        result["why"] = f"failed with status {done.returncode}: {told[-1]}"
        return result
    report = json.loads((folder / name / "report.json").read_text(encoding="utf-8"))
    report["folder"] = str(folder / name)
    try:
        found = row.values(report)
    except (IndexError, KeyError, TypeError):
        found, result["why"] = [], "its report lacks the number (out of memory, or too noisy a time): see its report.md"
    if not found and not result["why"]:
        result["why"] = "compared with row `full` of the same folder, which is not there"
    for what, value, sign, goal in found:
        kept = COMPARE[sign](value, goal)
        result["values"].append({"what": what, "value": value, "sign": sign, "goal": goal, "met": kept})
    return result


def write(folder: Path, results: Sequence[Report], environment: Report) -> None:
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
    lines = ["# Goals", "", f"On {names}.", "", *table(["row", "what", "value", "goal", ""], rows)]
    write_text(folder / "goals.md", "\n".join(lines))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/goals"), help="folder to write (default: %(default)s)")
    parser.add_argument("--rows", default=",".join(ROWS), help="names from --list (default: all)")
    parser.add_argument("--list", action="store_true", help="print the rows and their commands")
    parser.add_argument("--shrink", default="", help="arguments added to every command, to try the script on a CPU")
    options = parser.parse_args(arguments)
    if options.list:
        for name, row in ROWS.items():
            print(f"{name}: {shlex.join(command_of(row, options.out / name))}")
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
    environment, results, here = describe_environment(), [], max(1, torch.cuda.device_count())
    for name in names:
        if ROWS[name].gpus > here:
            why = f"needs {ROWS[name].gpus} GPUs, here is {here}"
            results.append({"row": name, "values": [], "why": why, "command": "", "seconds": 0.0})
        else:
            print(f"{name} ...", file=sys.stderr, flush=True)
            results.append(measure(name, options.out, shrink=shlex.split(options.shrink)))
        write(options.out, results, environment)
    print((options.out / "goals.md").read_text(encoding="utf-8"))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())

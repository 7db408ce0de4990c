# SPDX-License-Identifier: Apache-2.0
"""GPT-3 175B on the GPUs of one host, the paper's own setting: every layout and both proofs, in nine minutes.

    python launch/one_host.py --out runs/one_host                       # on all GPUs here, eight for the goals
    python launch/one_host.py --out runs/one_host --gpus 4              # the same layouts for four of them
    python launch/one_host.py --out runs/one_host --parts bf16-tp8,full # some of the parts
    python launch/one_host.py --list                                    # parts, planned seconds, commands

    python launch/one_host.py --out runs/rehearsal --gpus 2 --micro-batch 2 model.preset=tiny model.num_layers=4 \\
        model.vocab_size=300 data.sequence_length=64                    # on a CPU, where times say nothing

On N GPUs: bf16 at TP=N, TP=N/2 x PP=2 and PP=N (interleaved); FP8 at TP=N and TP=2 x DP=N/2; LoRA beside full
fine-tuning on the largest slices of layers that fit, scaled to all; an adapter that is written at one layout and loaded
at another; a run that is stopped and resumed. A part is a `lora-megatron bench` or `train`, run by processes that stay
(`launch/warm_ranks.py`); its own report lies in a folder of its name. report.md and report.json are written anew after
every part. One that would go beyond --budget is left out, and one that fails says why: the others still run.
The exit status is 0 whatever was met, 2 for what cannot be started.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch

from launch import side_by_side as side
from launch.one_host_report import DONE, FAILED, SKIPPED, lines_of
from launch.one_host_rows import CONFIG, check_overrides, shape_of
from launch.one_host_session import Part, Session, part_names
from launch.warm_ranks import WarmRanks, launch_environment
from lora_megatron.config import load_config
from lora_megatron.errors import ConfigError
from lora_megatron.measure.environment import describe_environment
from lora_megatron.model.shape import ModelShape
from lora_megatron.planning.gpus import find_gpu

KIND = "one_host"
BUDGET_S = 545.0
_GOALS_GPUS = 8
_VARIABLES = ("NCCL_", "PYTORCH_", "CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS")
_PATIENCE = 2.0
"""How many times its planned seconds a part may take."""
Report = dict[str, Any]


def run_parts(parts: Sequence[Part], left: Callable[[], float], write: Callable[[bool], None]) -> None:
    """Run each part that fits into the budget by its planned seconds, writing after each; `left` tells the budget."""
    for index, part in enumerate(parts):
        result, room = part.result, left()
        if result["planned_seconds"] > room:
            why = f"{result['planned_seconds']:.0f} s are planned and {max(0.0, room):.0f} s of --budget left"
            result |= {"state": SKIPPED, "why": why}
        else:
            print(f"{result['what']} ...", file=sys.stderr, flush=True)
            started = time.monotonic()
            why = part.run(min(room, _PATIENCE * result["planned_seconds"]))
            result |= {"state": FAILED if why else DONE, "why": why, "seconds": time.monotonic() - started}
        write(index == len(parts) - 1)


def run(options: argparse.Namespace) -> None:
    """The session; raises ConfigError for what cannot be started."""
    check_overrides(options.overrides)
    given = (name for name in ("gpus", "proof_layers") if getattr(options, name) is not None)
    side.require_positive(options, "micro_batch", "proof_steps", "budget", *given)
    options.out = _seen_from_root(options.out)
    with contextlib.chdir(ROOT):  # so that commands are told, and can be given again, with the repository's paths
        _run(options)


def _run(options: argparse.Namespace) -> None:
    here = torch.cuda.device_count()
    gpus = options.gpus or here or 2
    shape, environment = shape_of(load_config(CONFIG, options.overrides)), describe_environment()
    ranks = WarmRanks(options.out / "ranks", processes=gpus)
    session = Session(options, gpus, shape, ranks, _memory(environment, gpus, planning_only=options.list))
    session.check_proof_layers()
    if options.list:
        for part in session.parts():
            print(f"{part.result['part']} ({part.result['planned_seconds']:.0f} s): {part.result['command']}")
        return
    if here and gpus > here:
        raise ConfigError(f"--gpus {gpus}: here is {here}; leave it out to use all, or give fewer")
    wanted = _wanted(options, gpus, shape)
    side.make_folder(options.out, empty=True)  # results of two sessions never mix
    ranks.start()  # they import while this process plans
    try:
        parts = [part for part in session.parts() if part.result["part"] in wanted]
        report = _report(session, environment, [part.result for part in parts])

        def write(complete: bool) -> None:
            report["complete"] = complete
            side.write_report(options.out, report, lines_of(report))

        write(False)
        run_parts(parts, session.left, write)
    finally:
        ranks.stop()
    print((options.out / side.MARKDOWN_NAME).read_text(encoding="utf-8"))


def _seen_from_root(folder: Path) -> Path:
    """Relative where it lies in the repository."""
    whole = folder.absolute()
    return whole.relative_to(ROOT) if whole.is_relative_to(ROOT) else whole


def _wanted(options: argparse.Namespace, gpus: int, shape: ModelShape) -> list[str]:
    names = part_names(gpus, shape.num_layers)
    return names if options.parts is None else side.names_of(options.parts, names, flag="--parts")


def _memory(environment: Report, gpus: int, *, planning_only: bool) -> float:
    """Bytes of one GPU, or of the machine for each process; of an H200 where plans alone are asked for."""
    devices = environment["devices"]
    if devices["type"] == "cuda":
        return float(min(gpu["memory_bytes"] for gpu in devices["gpus"]))
    if planning_only or devices["memory_bytes"] is None:
        return find_gpu("h200").memory
    return float(devices["memory_bytes"] / gpus)


def _report(session: Session, environment: Report, parts: Sequence[Report]) -> Report:
    variables = launch_environment(session.gpus)
    return {
        "kind": KIND,
        "complete": False,
        "command": side.command_line("one_host.py"),
        "processes": session.gpus,
        "budget_seconds": session.options.budget,
        "shape": session.shape.to_dict(),
        "is_the_goals_setting": _is_the_goals_setting(session.shape, session.gpus, environment),
        "environment": environment,
        "variables": {key: value for key, value in sorted(variables.items()) if key.startswith(_VARIABLES)},
        "parts": list(parts),
    }


def _is_the_goals_setting(shape: ModelShape, gpus: int, environment: Report) -> bool:
    """Whether this is the shipped model on eight GPUs, of which the goals speak."""
    shipped = shape == shape_of(load_config(CONFIG))
    return shipped and gpus == _GOALS_GPUS and environment["devices"]["type"] == "cuda"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=f"win over {CONFIG} in every part")
    parser.add_argument("--out", type=Path, default=Path("runs/one_host"), help="a new folder (default: %(default)s)")
    parser.add_argument("--gpus", type=int, help="processes (default: a GPU each; 2 where there is none)")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds in all (default: %(default)g)")
    parser.add_argument("--parts", help="names from --list; resume needs adapter (default: all)")
    parser.add_argument("--micro-batch", type=int, default=8, help="the largest to try (default: %(default)s)")
    parser.add_argument("--proof-layers", type=int, help="of the runs of both proofs (default: all, if they fit)")
    parser.add_argument("--proof-steps", type=int, default=6, help="of those runs (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="print the parts and their commands")
    return parser.parse_intermixed_args(arguments)  # overrides may stand after options


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status as of `lora-megatron`."""
    options = parse(arguments)
    return side.status_of(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())

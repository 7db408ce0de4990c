# SPDX-License-Identifier: Apache-2.0
"""Ranks that stay: one torchrun whose processes run several `lora-megatron` commands one after the other.

Importing torch, megatron-core and CUDA costs more than a few steps of a large model do, so a session of many short
commands pays it once. Every command joins a world of its own and leaves it again; between two of them nothing is held
but CUDA's context. A command that takes a rank with it, or its time, costs a new start: the next ones still run.

    ranks = WarmRanks(folder, processes=8)
    ended = ranks.run(["bench", "config.yaml", ...], log=Path("bench.log"), limit=60)
    ranks.stop()

Commands and answers are files of `folder`: N.json from here, N-RANK.json from each rank.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch
import torch.distributed as dist

from lora_megatron.__main__ import main as run_command
from lora_megatron.commands import bench, train
from lora_megatron.commands.launch import Node, prepare
from lora_megatron.errors import EXIT_DONE, ConfigError
from lora_megatron.measure.atomic import write_json
from lora_megatron.parallel import groups
from lora_megatron.parallel.launcher import die_with_parent
from lora_megatron.strict_json import load_json_object

IMPORTED = (bench, train)
"""Before a rank waits for its first command, which would import them otherwise."""
_WORLD = ("RANK", "WORLD_SIZE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "MAX_RESTARTS")
"""Of the surroundings, which are not about the ranks of this machine."""
_LOOK_S = 0.02
_KILL_S = 20.0


@dataclass(frozen=True)
class Ended:
    """How a command ended; `why` is empty if well."""

    seconds: float
    why: str = ""


def launch_environment(processes: int) -> dict[str, str]:
    """Ours, with what workers need and the user did not set; NCCL_* and the like go on as they are."""
    environment = {name: value for name, value in os.environ.items() if name not in _WORLD}
    prepare(environment, Node.from_environment({}), processes, gpus=torch.cuda.device_count())
    if "PYTORCH_ALLOC_CONF" not in environment:
        environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    return environment


class WarmRanks:
    """`processes` ranks of this machine; they start with the first command, and end with this process at the latest."""

    def __init__(self, folder: Path, *, processes: int) -> None:
        self._folder, self._processes = folder, processes
        self._torchrun: subprocess.Popen[bytes] | None = None
        self._next = 0

    def start(self) -> None:
        """Start them if they are not there; returns at once."""
        if self._torchrun is not None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        environment = launch_environment(self._processes)
        # The agent keeps the store that every command's world meets at; a rank's own would end with the world.
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "0"
        words = Node.from_environment({}).torchrun_arguments(self._processes)
        with open(self._folder / "torchrun.log", "ab") as log:
            self._torchrun = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *words, __file__, str(self._folder), str(self._next)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                preexec_fn=die_with_parent,
            )

    def run(self, words: Sequence[str], *, log: Path, limit: float) -> Ended:
        """Run one command on all ranks, for `limit` seconds at most; both streams go into `log`."""
        started, number = time.monotonic(), self._next
        self.start()
        self._next += 1
        log.unlink(missing_ok=True)
        write_json(self._folder / f"{number}.json", {"words": list(words), "log": str(log.resolve())})
        answers = [self._folder / f"{number}-{rank}.json" for rank in range(self._processes)]
        why = self._await(answers, deadline=started + limit)
        if why:
            self._kill()
        else:
            statuses = [_read(answer)["status"] for answer in answers]
            why = f"ended with status {max(statuses)}" if any(statuses) else ""
        seconds = time.monotonic() - started
        return Ended(seconds, why and f"{why}{told(log)}")

    def _await(self, answers: Sequence[Path], *, deadline: float) -> str:
        """Until all are there; else why they will not come."""
        assert self._torchrun is not None
        while not all(answer.exists() for answer in answers):
            if time.monotonic() > deadline:
                return "took longer than its time and was ended"
            if (status := self._torchrun.poll()) is not None and not all(answer.exists() for answer in answers):
                return f"a rank was lost (torchrun ended with status {status})"
            time.sleep(_LOOK_S)
        return ""

    def stop(self) -> None:
        """End them in order, so that what comes next has the devices to itself."""
        if self._torchrun is None:
            return
        write_json(self._folder / f"{self._next}.json", {"words": [], "log": ""})
        self._next += 1
        try:
            self._torchrun.wait(_KILL_S)
        except subprocess.TimeoutExpired:
            self._kill()
        self._torchrun = None

    def _kill(self) -> None:
        """Workers die with their torchrun (`parallel.launcher.die_with_parent`)."""
        assert self._torchrun is not None
        self._torchrun.kill()
        self._torchrun.wait()
        self._torchrun = None


def told(log: Path) -> str:
    """What a command said of its end, as `: reason`: its first error, or its last line; empty if it said nothing."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error: " in line.lower()] or lines[-1:]
    return f": {errors[0]}" if errors else ""


def serve(folder: Path, first: int) -> None:
    """A rank: run commands from number `first` on until one without words comes."""
    die_with_parent()
    number, rank = first, os.environ["RANK"]
    while (job := _await_job(folder / f"{number}.json"))["words"]:
        started = time.monotonic()
        _redirect(job["log"])
        sys.argv = ["lora-megatron", *job["words"]]
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # under which the ranks of one world look for each other
        status = run_command(job["words"])
        _let_go()
        seconds = time.monotonic() - started
        write_json(folder / f"{number}-{rank}.json", {"status": status, "seconds": seconds})
        number += 1


def _await_job(path: Path) -> dict[str, Any]:
    while not path.exists():
        time.sleep(_LOOK_S)
    return _read(path)


def _read(path: Path) -> dict[str, Any]:
    return load_json_object(path, "a command or its answer", ConfigError)


def _redirect(log: str) -> None:
    """Both streams into a file that all ranks append to; NCCL's and CUDA's own lines too."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    os.close(descriptor)


def _let_go() -> None:
    """Leave the world if the command did not, and hand its memory back."""
    if dist.is_initialized():
        groups.stop()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
    sys.exit(EXIT_DONE)

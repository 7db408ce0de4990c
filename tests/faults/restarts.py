# SPDX-License-Identifier: Apache-2.0
"""Eight deaths in the middle of a step, eight restarts by torchrun, and the losses of a run that nobody disturbed.

    python -m tests.faults.restarts [--deaths 8] [--rendezvous standalone|c10d|static]

A script, as each attempt imports torch anew; `test_launcher.py` runs it with one death.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.commands.runs import log_of, make_corpus, make_tree
from tests.faults.ranks import free_port, train_ranks

RENDEZVOUS = ("standalone", "c10d", "static")
RANKS = 2


def rendezvous_arguments(kind: str) -> list[str]:
    """How the workers of one node find each other."""
    port, own_address = free_port(), ["--local-addr", "127.0.0.1"]
    if kind == "standalone":
        return ["--standalone", *own_address]
    if kind == "static":
        return ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    return ["--rdzv-backend", "c10d", "--rdzv-id", "job", "--rdzv-endpoint", f"127.0.0.1:{port}", *own_address]


def train_through_deaths(
    config: Path, deaths: list[int], *, kind: str, victim: int
) -> subprocess.CompletedProcess[str]:
    """Let rank `victim` die in these steps, one an attempt; torchrun may restart as often."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
        "STEPS_TO_DIE_AT": ",".join(map(str, deaths)),
        "RANK_TO_KILL": str(victim),
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", *rendezvous_arguments(kind)]
    workers = ["--nproc-per-node", str(RANKS), "--max-restarts", str(len(deaths)), "--monitor-interval", "0.2"]
    command = [*launcher, *workers, "-m", "tests.faults.dying", "train", str(config)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1000)


def recovered(folder: Path, deaths: list[int], *, kind: str, victim: int) -> bool:
    """Whether the run ended well with exactly the losses of an undisturbed one, each step once."""
    corpus = make_corpus(folder / "corpus")
    train = {"steps": 10, "save_every": 1, "async_save": False}
    trees = {name: make_tree(corpus, folder / name, parallel={"tensor": RANKS}, train=train) for name in ("one", "two")}
    with train_ranks(trees["one"], world=RANKS, folder=folder / "undisturbed") as ranks:
        if ranks.statuses() != [0] * RANKS:
            return False
    config = folder / "config.yaml"
    config.write_text(json.dumps(trees["two"]), encoding="utf-8")
    done = train_through_deaths(config, deaths, kind=kind, victim=victim)
    resumed = done.stderr.count("resumed from")
    print(
        f"{kind}: {len(deaths)} deaths of rank {victim}, {resumed} times resumed, torchrun ends with {done.returncode}"
    )
    one, two = ([(line["step"], line["loss"]) for line in log_of(folder / name)] for name in ("one", "two"))
    is_well = (done.returncode, resumed, two) == (0, len(deaths), one)
    if not is_well:
        print(done.stderr[-5000:], file=sys.stderr)
    return is_well


def main() -> int:
    """Exit status 0 if every death was recovered from."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deaths", type=int, default=8)
    parser.add_argument("--rendezvous", choices=RENDEZVOUS, default=RENDEZVOUS[0])
    parser.add_argument("--victim", type=int, default=1)
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        # The first attempt dies in step 2, when step 1 is saved, and each later one a step further on.
        deaths = [2 + death for death in range(arguments.deaths)]
        is_well = recovered(Path(folder), deaths, kind=arguments.rendezvous, victim=arguments.victim)
    print(f"{'recovered' if is_well else 'NOT recovered'} in {time.monotonic() - started:.0f} s")
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())

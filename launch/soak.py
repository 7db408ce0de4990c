# SPDX-License-Identifier: Apache-2.0
"""Kill a small training run at random moments, over and over, and count what is lost.

    python launch/soak.py --kills 300 --json soak.json --markdown soak.md

Each round trains a tiny GPT on two ranks (tensor- and pipeline-parallel in turn, saving in the background at every
second step) to its end. Meanwhile one rank, or both, die by SIGKILL at a random time, half of the times aimed at a save
under way, and the run is started again with run.resume=auto. After each kill everything under a checkpoint's name must
verify, nothing that was whole may be gone, and what was trained since the last save is all that may be lost; at the
end of each round losses and adapter must be those of a run that was never killed, to the bit.

Needs the repository (its tests' fork server starts two ranks in a fraction of a second) and no GPU. Exit status 0 only
if nothing was lost or wrong.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # fork server

from rich.console import Console
from rich.progress import Progress

from lora_megatron.checkpoint.folder import read_manifest
from lora_megatron.checkpoint.state import checkpoints, step_of
from lora_megatron.checkpoint.tensors import require_finite
from lora_megatron.errors import CheckpointError
from lora_megatron.measure.console import print_table
from lora_megatron.measure.environment import describe_environment
from lora_megatron.measure.markdown import table
from tests.commands.runs import losses_of, make_corpus, make_tree
from tests.faults.ranks import Ranks, train_ranks
from tests.faults.recovery import Result, result_of

LAYOUTS = {"TP2": {"tensor": 2}, "PP2": {"pipeline": 2}}
STEPS, SAVE_EVERY = 16, 2
ASK_AFTER_S, SURVIVOR_S = 5.0, 120.0
"""How long a rank may outlive the other before it is asked where it is, and before it counts as a survivor."""
ASK_WHERE = signal.SIGRTMIN + 1
MEETING = ("join_world", "build_mesh")
"""Where ranks meet: one that waits there for the other cannot know that it is dead; torchrun ends it."""


def answer_where() -> None:
    """In a rank: write where it is to its log when asked."""
    faulthandler.register(ASK_WHERE)


@dataclass
class Tally:
    """What happened, and what must not have."""

    kills: int = 0
    rounds: int = 0
    attempts: int = 0
    half_written_left: int = 0
    """Kills after which a folder under a temporary name was there: they hit a save."""
    steps_trained_again: int = 0
    victims: dict[str, int] = field(default_factory=dict)
    layouts: dict[str, int] = field(default_factory=dict)
    ended_by_us: int = 0
    """Ranks that waited for one to join that was dead; torchrun ends such a rank."""
    damaged_checkpoints: int = 0
    lost_checkpoints: int = 0
    too_many_steps_lost: int = 0
    failed_resumes: int = 0
    wrong_results: int = 0
    survivors: int = 0
    complaints: list[str] = field(default_factory=list)

    @property
    def faults(self) -> dict[str, int]:
        """All of these must be 0."""
        names = ("damaged_checkpoints", "lost_checkpoints", "too_many_steps_lost", "failed_resumes", "wrong_results")
        return {name.replace("_", " "): getattr(self, name) for name in (*names, "survivors")}

    def complain(self, name: str, text: str) -> None:
        """Count a fault."""
        setattr(self, name, getattr(self, name) + 1)
        self.complaints.append(f"{name} after kill {self.kills}: {text}")


class Soak:
    """Rounds of training under kills, in a scratch folder."""

    def __init__(self, scratch: Path, *, kills: int, seed: int) -> None:
        self.scratch, self.kills, self.choose, self.tally = scratch, kills, random.Random(seed), Tally()
        self._corpus = make_corpus(scratch / "corpus")
        self._expected: dict[str, Result] = {}
        self._seconds: dict[str, float] = {}

    def _tree(self, layout: str, run: Path) -> dict[str, Any]:
        train = {"steps": STEPS, "save_every": SAVE_EVERY, "eval_every": 8}
        tree = make_tree(self._corpus, run, parallel=LAYOUTS[layout], train=train)
        tree["run"]["resume"] = "auto"
        return tree

    def undisturbed(self, layout: str) -> None:
        """Train once without a kill, for the result and the time that it takes."""
        run = self.scratch / f"undisturbed-{layout}"
        for folder in (run, self.scratch / f"again-{layout}"):  # the first one also waits for the fork server
            started = time.monotonic()
            with train_ranks(self._tree(layout, folder), world=2, folder=self.scratch / "logs-undisturbed") as ranks:
                assert ranks.statuses() == [0, 0], ranks.logs()
            self._seconds[layout] = time.monotonic() - started
        self._expected[layout] = result_of(run)
        assert result_of(self.scratch / f"again-{layout}") == self._expected[layout], (
            "training itself is not repeatable"
        )

    def round(self, layout: str, advance: Any) -> None:
        """Train to the end under kills."""
        tally, seen = self.tally, -1
        folder = self.scratch / f"round-{tally.rounds}"
        run = folder / "run"
        tree = self._tree(layout, run)
        while True:
            tally.attempts += 1
            with train_ranks(tree, world=2, folder=folder, before=answer_where) as ranks:
                killed = tally.kills < self.kills and self._kill(ranks, run, layout)
                if killed and not ranks.wait(seconds=ASK_AFTER_S):
                    self._end(ranks)
                statuses, logs = ranks.statuses(), ranks.logs()
            if not killed:
                break
            tally.kills += 1
            tally.layouts[layout] = tally.layouts.get(layout, 0) + 1
            advance()
            seen = self._check(run, seen)
        tally.rounds += 1
        if statuses != [0, 0]:
            tally.complain("failed_resumes", f"statuses {statuses}: {logs[-2000:]}")
        elif result_of(run) != self._expected[layout]:
            tally.complain("wrong_results", f"{run} differs from the run that nothing disturbed")
        if not tally.complaints:
            shutil.rmtree(folder)

    def _kill(self, ranks: Ranks, run: Path, layout: str) -> bool:
        """Wait for a random moment and kill; False when the run had ended before."""
        if self.choose.random() < 0.5:  # a moment of a save under way
            saves, before = self.choose.randrange(1, 5), ""
            while saves and ranks.alive:
                names = [path.name for path in (run / "checkpoints").glob(".tmp-step-*")]
                if names and names[0] != before:
                    before, saves = names[0], saves - 1
                time.sleep(0.0005)
            time.sleep(self.choose.random() * 0.03)
        else:
            deadline = time.monotonic() + self.choose.random() * self._seconds[layout]
            while ranks.alive and time.monotonic() < deadline:
                time.sleep(0.002)
        victims = self.choose.choice([(0,), (1,), (0, 1)])
        if len(ranks.alive) < 2:
            return False
        ranks.kill(*victims)
        died = ranks.wait(*victims) and any(ranks.status(rank) == -signal.SIGKILL for rank in victims)
        name = "both" if len(victims) == 2 else f"rank {victims[0]}"
        self.tally.victims[name] = self.tally.victims.get(name, 0) + died
        return died

    def _end(self, ranks: Ranks) -> None:
        """Do torchrun's part for a rank that outlives the other; only one that waits for it to join a group may."""
        for rank in ranks.alive:
            ranks.kill(rank, number=ASK_WHERE)
            ranks.wait(rank, seconds=1)
            if any(f" in {name}" in ranks.log(rank) for name in MEETING):
                self.tally.ended_by_us += 1
            elif not ranks.wait(rank, seconds=SURVIVOR_S):
                self.tally.complain("survivors", f"rank {rank}: {ranks.log(rank)[-3000:]}")
        ranks.kill()

    def _check(self, run: Path, seen: int) -> int:
        """Look at what a kill has left; answers the newest whole step."""
        tally, newest = self.tally, -1
        tally.half_written_left += any((run / "checkpoints").glob(".tmp-step-*"))
        for folder in checkpoints(run):
            try:
                manifest = read_manifest(folder)
                for path in folder.glob("*.safetensors"):
                    require_finite(path)
                assert manifest["step"] == step_of(folder), f"{folder} holds step {manifest['step']}"
                newest = max(newest, step_of(folder))
            except (CheckpointError, AssertionError) as problem:
                tally.complain("damaged_checkpoints", str(problem))
        if newest < seen:
            tally.complain("lost_checkpoints", f"step {seen} was whole and the newest is now {newest}")
        trained = max(losses_of(run), default=0) if (run / "metrics.jsonl").exists() else 0
        # A due save waits for the one under way, so at most one due checkpoint is not there yet.
        if trained - max(newest, 0) > 2 * SAVE_EVERY:
            tally.complain("too_many_steps_lost", f"step {trained} was trained, the newest checkpoint is of {newest}")
        tally.steps_trained_again += max(0, trained - max(newest, 0))
        return newest

    def run(self, console: Console) -> Tally:
        """Rounds until all kills are done."""
        for layout in LAYOUTS:
            self.undisturbed(layout)
        with Progress(console=console) as progress:
            task = progress.add_task("kills", total=self.kills)
            while self.tally.kills < self.kills:
                self.round(list(LAYOUTS)[self.tally.rounds % 2], lambda: progress.advance(task))
        return self.tally


def describe(tally: Tally, *, seconds: float, seed: int) -> dict[str, Any]:
    """The result as plain values."""
    return {**asdict(tally), "faults": tally.faults, "seconds": round(seconds), "seed": seed, "cores": os.cpu_count()}


def rows_of(facts: dict[str, Any]) -> list[list[str]]:
    """The result for a table."""
    split = {name: ", ".join(f"{key} {n}" for key, n in sorted(facts[name].items())) for name in ("victims", "layouts")}
    return [
        ["kills", f"{facts['kills']} ({split['victims']}; {split['layouts']})"],
        ["kills that left a half-written save", str(facts["half_written_left"])],
        ["runs trained to their end", f"{facts['rounds']} in {facts['attempts']} attempts"],
        ["ranks that waited for a dead one to join, ended as torchrun does", str(facts["ended_by_us"])],
        ["steps trained again", str(facts["steps_trained_again"])],
        *([name, str(count)] for name, count in facts["faults"].items()),
        ["time", f"{facts['seconds'] / 60:.1f} min on {facts['cores']} cores, seed {facts['seed']}"],
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the soak; 0 if nothing was lost or wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--markdown", type=Path, help="write a table there")
    parser.add_argument("--scratch", type=Path, help="work there and leave it (else in a temporary folder)")
    arguments = parser.parse_args(argv)
    console, started = Console(stderr=True), time.monotonic()
    scratch = arguments.scratch or Path(tempfile.mkdtemp(prefix="soak-"))
    tally = Soak(scratch, kills=arguments.kills, seed=arguments.seed).run(console)
    facts = describe(tally, seconds=time.monotonic() - started, seed=arguments.seed)
    rows = rows_of(facts)
    print_table("soak", ["", "result"], rows, numbers=False)
    for complaint in tally.complaints:
        console.print(complaint, style="red", markup=False)
    if arguments.json:
        arguments.json.write_text(json.dumps({**facts, "environment": describe_environment()}, indent=2) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(table(["", "result"], rows, numbers=False)))
    if not arguments.scratch and not tally.complaints:
        shutil.rmtree(scratch)
    return 1 if any(tally.faults.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

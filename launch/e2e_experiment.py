# SPDX-License-Identifier: Apache-2.0
"""One experiment on one GPU: pretrain a GPT-2 small, adapt it to E2E with LoRA and fully, score all on E2E's test set.

    python launch/e2e_experiment.py --raw path/to/raw --out runs/e2e --jobs 3 --stop-after 560
    python launch/e2e_experiment.py --raw path/to/raw --out runs/e2e-rehearsal --seeds 1,2 --pretrain-steps 20 \\
        --adapt-epochs 1 --rows 40 --limit 4 \\
        --shrink 'model.preset=tiny train.precision=fp32 train.warmup_steps=0'                       # on a CPU

--raw has the published files: e2e/devset.csv, e2e/testset_w_refs.csv, webnlg/dev.json,
dart/dart-v1.1.1-full-dev.json, and gpt2_bpe/ with encoder.json and vocab.bpe. The adaptations train on E2E's
development set; what else is chosen, and why, is in e2e_corpus.py and e2e_plan.py.

Each stage is a command of this project, run as a process of its own; its output is in logs/. What is finished is not
done again: the same command goes on where an earlier one ended. The report is written from what is there, also when
a stage fails or the time is over.

    configs/ logs/ raw/ data/ base/ lora-seed1/ full-seed1/ .. evaluations/base/ evaluations/lora-seed1/ ..
    report.json, report.md     settings.json, prepared.json, timeline.json: what the next start goes on from
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from launch import side_by_side as side
from launch.e2e_corpus import prepare, require_raw
from launch.e2e_plan import (
    BASE,
    Settings,
    config_path,
    evaluation,
    evaluation_folder,
    preparation,
    render,
    seeds_of,
    training,
)
from launch.e2e_report import write_findings
from lora_megatron.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, CheckpointError, ConfigError, Preempted, UserError
from lora_megatron.measure.atomic import write_json, write_text
from lora_megatron.measure.report_folder import require_no_file
from lora_megatron.measure.units import show_seconds
from lora_megatron.quickstart.stages import run_stage, termination_as_exit
from lora_megatron.strict_json import load_json_object

SETTINGS, PREPARED, TIMELINE = "settings.json", "prepared.json", "timeline.json"


class TimeIsOver(Preempted):
    """--stop-after; what was under way goes on from its checkpoint, or anew."""

    def __init__(self, seconds: float) -> None:
        super().__init__("SIGTERM")
        self._seconds = seconds

    def __str__(self) -> str:
        return f"stopped after {show_seconds(self._seconds)}, as --stop-after says: the same command goes on"


class Stages:
    """Runs stages, says when each begins and ends, and writes that down; stages may run in several threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._started = time.monotonic()
        self._path = settings.out / TIMELINE
        earlier = load_json_object(self._path, "a timeline", CheckpointError) if self._path.exists() else {}
        self._stages: dict[str, Any] = earlier.get("stages", {})
        self._earlier: list[float] = earlier.get("wall_seconds", [])
        self._lock = threading.Lock()
        self.cancelled = threading.Event()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(max(1, cores // settings.jobs)),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }

    def elapsed(self) -> float:
        """Seconds since this start."""
        return time.monotonic() - self._started

    def say(self, text: str) -> None:
        """A line of the timeline."""
        print(f"[{self.elapsed():6.1f} s] {text}", file=sys.stderr, flush=True)

    def run(self, name: str, command: Sequence[str]) -> None:
        """Run a command to its end; raises UserError with its own words, or TimeIsOver."""
        self._check()
        began = self.elapsed()
        self.say(f"{name} begins")
        log = self._settings.out / "logs" / f"{name}.log"
        try:
            run_stage(command, log=log, environment=self._environment, follow=self._check)
        except UserError as error:
            raise type(error)(f"{name}: {error}") from None
        except RuntimeError as error:
            raise UserError(f"{name}: {str(error).splitlines()[0]} {str(error).splitlines()[-1]}") from None
        self.note(name, began)

    def note(self, name: str, began: float) -> None:
        """Write down that a stage which began then is done."""
        seconds = self.elapsed() - began
        self.say(f"{name} done in {show_seconds(seconds)}")
        with self._lock:
            self._stages[name] = {"began": began, "seconds": seconds, "start": len(self._earlier) + 1}
            self.save()

    def save(self) -> None:
        """timeline.json: the stages, and how long each start of the experiment took."""
        write_json(self._path, {"stages": self._stages, "wall_seconds": [*self._earlier, self.elapsed()]})

    def _check(self) -> None:
        limit = self._settings.stop_after
        if self.cancelled.is_set() or (limit is not None and self.elapsed() > limit):
            raise TimeIsOver(self.elapsed())


def experiment(settings: Settings) -> None:
    """Everything that is not there yet, then the report.

    Raises:
        UserError: a setting cannot be, or a stage failed for a reason it could name.
        TimeIsOver: --stop-after came first.
    """
    require_raw(settings.raw)
    _claim(settings)
    stages = Stages(settings)
    try:
        with termination_as_exit():
            _prepare(settings, stages)
            for name in (BASE, *settings.adaptations):
                write_text(config_path(name, settings), render(name, settings))
            _train(BASE, settings, stages)
            tasks = [lambda name=name: _adapt(name, settings, stages) for name in settings.adaptations]
            _side_by_side([*tasks, lambda: _evaluate(BASE, settings, stages)], settings.jobs, stages.cancelled)
    finally:
        stages.save()
        missing = write_findings(settings, command=side.command_line(Path(__file__).name))
        stages.say(f"{'all runs are done' if not missing else 'missing: ' + ', '.join(missing)}")
        print(settings.out / side.MARKDOWN_NAME)


def _claim(settings: Settings) -> None:
    """Make the folder, or find it with the same settings; raises ConfigError."""
    path, identity = settings.out / SETTINGS, json.loads(json.dumps(settings.identity()))
    require_no_file(settings.out)
    if path.exists():
        there = load_json_object(path, "the settings of an experiment", CheckpointError)
        for name in sorted({*there, *identity}):
            if there.get(name) != identity.get(name):
                raise ConfigError(
                    f"--out {settings.out} holds an experiment with {name} = {there.get(name)}, and here it is "
                    f"{identity.get(name)}: choose another folder, or give the settings of that one"
                )
        return
    if settings.out.is_dir() and any(settings.out.iterdir()):
        raise ConfigError(f"--out {settings.out} holds something else than an experiment: choose another folder")
    for name in ("configs", "logs", "evaluations"):
        (settings.out / name).mkdir(parents=True)
    write_json(path, identity)


def _prepare(settings: Settings, stages: Stages) -> None:
    if (settings.out / PREPARED).exists():
        stages.say("data is there")
        return
    began = stages.elapsed()

    def prepare_by(*arguments: str) -> None:
        stages.run(f"data-{arguments[0]}", preparation(arguments))

    facts = prepare(settings.raw, settings.out, prepare_by=prepare_by, rows=settings.rows)
    write_json(settings.out / PREPARED, facts)
    stages.note("data", began)


def _train(name: str, settings: Settings, stages: Stages) -> None:
    status = settings.out / name / "status.json"
    if status.exists() and load_json_object(status, "a run's status", CheckpointError).get("state") == "done":
        stages.say(f"{name} is there")
        return
    stages.run(name, training(name, settings))


def _evaluate(name: str, settings: Settings, stages: Stages) -> None:
    if (evaluation_folder(name, settings) / "scores.json").exists():
        stages.say(f"{name}-test is there")
        return
    stages.run(f"{name}-test", evaluation(name, settings))


def _adapt(name: str, settings: Settings, stages: Stages) -> None:
    _train(name, settings, stages)
    _evaluate(name, settings, stages)


def _side_by_side(tasks: Sequence[Callable[[], None]], jobs: int, cancelled: threading.Event) -> None:
    """Run the tasks, `jobs` at a time; one that fails leaves the others alone, and its error is raised at the end."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            futures = [pool.submit(task) for task in tasks]
            wait(futures)
        finally:
            cancelled.set()  # after a signal those that run look at it; when all are done it changes nothing
            pool.shutdown(cancel_futures=True)
    errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
    for error in sorted(
        errors, key=lambda error: isinstance(error, TimeIsOver)
    ):  # what went wrong comes before what was stopped
        raise error


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 all done, 75 out of time, or as in lora_megatron.errors."""
    try:
        return side.status_of(lambda: experiment(_settings(argv)))
    except TimeIsOver as stopped:
        print(f"{stopped}", file=sys.stderr)
        return EXIT_PREEMPTED
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return EXIT_INTERRUPTED


def _settings(argv: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--raw", type=Path, required=True, metavar="DIR", help="folder of the published files, see above")
    flag("--out", type=Path, required=True, metavar="DIR", help="a new folder, or one to go on in")
    flag("--seeds", default="1,2,3", metavar="N,N", help="of both adaptations (default: %(default)s)")
    flag("--jobs", type=int, default=3, metavar="N", help="processes at a time on the GPU (default: %(default)s)")
    flag("--stop-after", type=float, metavar="S", help="seconds after which what runs is stopped and reported")
    flag("--pretrain-steps", type=int, default=600, metavar="N", help="of 32 packed rows (default: %(default)s)")
    flag("--adapt-epochs", type=float, default=5.0, metavar="X", help="of each adaptation (default: %(default)s)")
    flag("--lora-lr", type=float, default=1e-3, metavar="X", help="learning rate of LoRA (default: %(default)s)")
    flag("--full-lr", type=float, default=1e-4, metavar="X", help="of full fine-tuning (default: %(default)s)")
    flag("--limit", type=int, metavar="N", help="the first N test instances alone (default: all)")
    flag("--base-limit", type=int, default=64, metavar="N", help="for the base alone (default: %(default)s)")
    flag("--rows", type=int, metavar="N", help="at most N rows of each prepared file, for a rehearsal")
    flag("--shrink", default="", metavar="'K=V ..'", help="overrides of all configurations, for a rehearsal")
    values = vars(parser.parse_args(argv))
    return Settings(**{**values, "seeds": seeds_of(values["seeds"]), "shrink": tuple(shlex.split(values["shrink"]))})


if __name__ == "__main__":
    sys.exit(main())

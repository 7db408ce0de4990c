# SPDX-License-Identifier: Apache-2.0
"""A termination signal ends a run on all ranks with status 75 and a checkpoint; the next start goes on bit by bit.

The signals come from inside, at a named point of the run: the n-th time that a rank calls a function.
"""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lora_megatron.commands import history, saving
from lora_megatron.commands import train as command
from lora_megatron.training import held_out, loop
from tests.commands.runs import (
    Tree,
    checkpoint_of,
    evaluations_of,
    log_of,
    make_tree,
    names_in,
    status_of,
)
from tests.faults.ranks import start, train_ranks

MODULES = {"command": command, "held_out": held_out, "history": history, "loop": loop, "saving": saving}
TRAIN = {"steps": 6, "save_every": 4, "eval_every": 3, "warmup_steps": 1}


def patch(point: str = "", call: int = 0, victim: int = 0, numbers: tuple[int, ...] = ()) -> None:
    """Evaluate two microbatches a call. Let rank `victim` signal itself when it calls `module.function` for the
    `call`-th time."""
    held_out._MICROBATCHES_PER_CALL = 2
    if not point or int(os.environ["RANK"]) != victim:
        return
    name, _, attribute = point.partition(".")
    original, calls = getattr(MODULES[name], attribute), 0

    def counting(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(*arguments, **named)

    setattr(MODULES[name], attribute, counting)


def run_to_end(tree: Tree, world: int, folder: Path) -> list[int]:
    with train_ranks(tree, world=world, folder=folder, before=patch) as ranks:
        return ranks.statuses()


def record_of(run: Path) -> tuple[list[tuple[int, float]], list[Tree]]:
    """Every step with its loss, and every evaluation, as they stand in the logs."""
    return [(line["step"], line["loss"]) for line in log_of(run)], evaluations_of(run)


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same run without a signal, by number of tensor ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    runs = {world: folder / f"run-{world}" for world in (1, 2)}
    for world, run in runs.items():
        tree = make_tree(corpus, run, train=TRAIN, parallel={"tensor": world})
        assert run_to_end(tree, world, folder / str(world)) == [0] * world
    return runs


@pytest.mark.parametrize(
    ("world", "victim", "numbers", "point", "call", "step"),
    [
        (2, 1, (signal.SIGTERM,), "loop.run_microbatches", 3, 3),
        (1, 0, (signal.SIGUSR1, signal.SIGTERM), "loop.run_microbatches", 6, 6),
        (1, 0, (signal.SIGINT,), "held_out.run_microbatches", 2, 0),
        (2, 0, (signal.SIGTERM,), "held_out.run_microbatches", 5, 3),
        (1, 0, (signal.SIGTERM, signal.SIGTERM), "saving.save_checkpoint", 1, 5),
        (1, 0, (signal.SIGUSR2,), "saving.save_checkpoint", 2, 6),
        pytest.param(2, 1, (signal.SIGTERM,), "command.build", 1, 0, marks=pytest.mark.slow),
    ],
    ids=["step", "twice in the last step", "first evaluation", "evaluation", "twice in a save", "last save", "start"],
)
def test_a_signal_ends_all_ranks_and_the_next_start_goes_on(
    corpus: Path,
    tmp_path: Path,
    undisturbed: dict[int, Path],
    world: int,
    victim: int,
    numbers: tuple[int, ...],
    point: str,
    call: int,
    step: int,
) -> None:
    run = tmp_path / "run"
    tree = make_tree(corpus, run, train=TRAIN, parallel={"tensor": world})
    before = partial(patch, point, call, victim, numbers)
    with train_ranks(tree, world=world, folder=tmp_path / "first", before=before) as ranks:
        assert ranks.statuses() == [75] * world
        said = ranks.log(0)
    stopped, status = signal.Signals(numbers[0]).name, status_of(run)
    assert (status["state"], status["exit_status"]) == ("preempted", 75)
    assert (status["signal"], status["step"]) == (stopped, step)  # the step under way is finished, an evaluation is not
    assert f"preempted: {stopped} stopped the run at step {step}" in said
    assert "go on with run.resume=auto" in said
    assert "Traceback" not in said
    saved = names_in(run / "checkpoints") if (run / "checkpoints").exists() else []
    assert saved[-1:] == ([checkpoint_of(run, step).name] if step else [])
    tree["run"]["resume"] = "auto"
    assert run_to_end(tree, world, tmp_path / "second") == [0] * world
    assert record_of(run) == record_of(undisturbed[world])
    assert status_of(run)["state"] == "done"


def test_before_anything_begins_there_is_nothing_to_save(corpus: Path, tmp_path: Path) -> None:
    tree = make_tree(corpus, tmp_path / "run", train=TRAIN)
    before = partial(patch, "command.resolve_base", 1, 0, (signal.SIGTERM,))
    with train_ranks(tree, world=1, folder=tmp_path / "ranks", before=before) as ranks:
        assert ranks.statuses() == [75]
        assert "preempted: SIGTERM came before anything began: start the same command again" in ranks.log()
    assert not (tmp_path / "run").exists()


def test_ctrl_c_in_another_command_is_one_line(tmp_path: Path) -> None:
    """`inspect` reads from a pipe that nobody writes into, as it would from a slow disk."""
    pipe = tmp_path / "config.json"
    os.mkfifo(pipe)
    (tmp_path / "model.safetensors").touch()
    with start(["inspect", str(tmp_path)], world=1, logs=tmp_path / "logs") as ranks:
        ranks.wait_until(lambda: _has_reader(pipe))
        ranks.kill(number=signal.SIGINT)
        assert ranks.statuses() == [130]
        assert ranks.log() == "interrupted\n"


def _has_reader(pipe: Path) -> bool:
    """Whether somebody has it open; this process is its writer from then on, and writes nothing."""
    try:
        os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return False
    return True


def _let_the_reader_go_away() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_reader_that_goes_away_is_no_error(undisturbed: dict[int, Path], tmp_path: Path, flags: list[str]) -> None:
    arguments = ["inspect", str(undisturbed[1] / "adapter"), *flags]
    with start(arguments, world=1, logs=tmp_path / "logs", before=_let_the_reader_go_away) as ranks:
        assert ranks.statuses() == [141]
        assert ranks.log() == ""

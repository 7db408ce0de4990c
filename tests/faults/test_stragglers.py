# SPDX-License-Identifier: Apache-2.0
"""A rank that is slow by itself is named; one that only waits for it is not."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lora_megatron.data.batches import BatchSource
from lora_megatron.training import stragglers
from lora_megatron.training.stragglers import judge, probe_seconds
from tests.commands.runs import Outcome, Tree, attempt, losses_of, make_tree
from tests.pool import Pool


def train_with_a_slow_rank(tree: Tree, slow: str, victim: int) -> Outcome:
    """Rank `victim` makes each microbatch 50 ms late, or takes three times as long for the probe; the others' probes
    are all equal, whatever else this machine does."""
    is_slow = dist.get_rank() == victim
    microbatch = BatchSource.microbatch

    def make(self: BatchSource, first_sample: int) -> Any:
        time.sleep(0.05 if slow == "data" and is_slow else 0)
        return microbatch(self, first_sample)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(BatchSource, "microbatch", make)
        patched.setattr(stragglers, "probe_seconds", lambda: 0.003 if slow == "device" and is_slow else 0.001)
        return attempt(tree)


def looks(run: Path) -> list[Tree]:
    return [json.loads(line) for line in (run / "stragglers.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("slow", "parallel", "victim", "named"),
    [("data", {"tensor": 2}, 1, 1), ("device", {}, 0, 0), ("nobody", {}, 0, None)],
)
def test_the_slow_rank_is_named(
    pool: Pool, corpus: Path, tmp_path: Path, slow: str, parallel: Tree, victim: int, named: int | None
) -> None:
    run = tmp_path / "run"
    tree = make_tree(corpus, run, parallel=parallel, train={"straggler_every": 2, "save_every": 4})
    assert pool.run(2, train_with_a_slow_rank, tree=tree, slow=slow, victim=victim) == [Outcome()] * 2
    lines = looks(run)
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(len(line["busy_seconds"]) == 2 for line in lines)
    if slow != "nobody":  # an even run is judged below: this machine may hold up one of two ranks by itself
        assert [line["slowest"] for line in lines] == [named] * 3
        word = {"data": "its data takes", "device": "its device takes 3.00 times"}[slow]
        assert all(word in line["reason"] for line in lines)
    else:
        assert not any("device" in line["reason"] for line in lines)


def test_looking_changes_no_loss_and_a_resume_repeats_no_line(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    for name, every in (("looked", 2), ("not", 0)):
        tree = make_tree(corpus, tmp_path / name, train={"straggler_every": every, "save_every": 2, "steps": 6})
        assert pool.run(2, attempt, tree=tree) == [Outcome()] * 2
    assert losses_of(tmp_path / "looked") == losses_of(tmp_path / "not")
    assert not (tmp_path / "not" / "stragglers.jsonl").exists()
    run = tmp_path / "looked"
    tree = make_tree(corpus, run, train={"straggler_every": 2, "save_every": 2, "steps": 6})
    tree["run"]["resume"] = str(run / "checkpoints" / "step-00000004")
    assert pool.run(2, attempt, tree=tree) == [Outcome()] * 2
    assert [line["step"] for line in looks(run)] == [2, 4, 6]


def test_who_is_slow_and_who_is_not() -> None:
    even = [0.010, 0.011, 0.010, 0.011]
    assert judge(7, even, even, 1.0).slowest is None
    assert judge(7, [0.010, 0.011, 0.010, 0.059], even, 1.0).slowest is None  # too little of a step to matter
    late = judge(7, [0.010, 0.011, 0.010, 0.070], even, 1.0)
    assert (late.slowest, late.reason) == (3, "its data takes 60 ms a step longer than the median rank's")
    hot = judge(7, [0.010, 0.011, 0.010, 0.070], [0.010, 0.013, 0.010, 0.010], 1.0)
    assert (hot.slowest, hot.reason) == (1, "its device takes 1.30 times as long as the median rank's")
    assert hot.busy_seconds == pytest.approx([0.020, 0.024, 0.020, 0.080])
    assert judge(7, [0.0, 0.0], [0.010, 0.0119], 1.0).slowest is None
    assert judge(7, [0.0, 0.0], [0.010, 0.0121], 1.0).slowest == 1


def test_the_probe_is_short_and_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    started = time.process_time()
    assert 0 < probe_seconds() < 10
    assert time.process_time() - started < 2
    assert torch.equal(torch.get_rng_state(), before)

# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation hold a few microbatches at a time, however many a step or the held-out data has."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from lora_megatron.data import batches
from tests.commands.runs import Outcome, Tree, attempt, evaluations_of, losses_of, make_corpus, make_tree
from tests.pool import Pool

AT_MOST = 4  # the one in work, the first of the call, and what the interpreter still refers to


def attempt_and_count(tree: Tree) -> tuple[Outcome, int, int]:
    """How the run ended, how many microbatches it made, and how many of them were alive at one time at most."""
    original, alive, seen = batches.BatchSource._collate, weakref.WeakSet(), [0, 0]

    def collate(self: Any, rows: list[int], first_sample: int) -> Any:
        batch = original(self, rows, first_sample)
        gc.collect()
        alive.add(batch["attention_mask"])
        seen[:] = [seen[0] + 1, max(seen[1], len(alive))]
        return batch

    batches.BatchSource._collate = collate  # type: ignore[method-assign]
    gc.collect()
    gc.freeze()  # what this process has gathered before need not be looked through at every microbatch
    try:
        return attempt(tree), *seen
    finally:
        gc.unfreeze()
        batches.BatchSource._collate = original  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "prepared", rows=63)  # 21 held out: no whole rounds


def packed(corpus: Path, run: Path, parallel: Tree) -> Tree:
    data = {"packing": True, "global_batch_size": 16}
    return make_tree(corpus, run, data=data, parallel=parallel, train={"steps": 2, "save_every": 0})


def test_few_microbatches_are_alive_at_one_time(corpus: Path, tmp_path: Path) -> None:
    outcome, made, alive = attempt_and_count(packed(corpus, tmp_path / "run", {}))
    assert outcome == Outcome()
    assert made >= 2 * 16 + 20  # two steps and the held-out rows
    assert alive <= AT_MOST


def test_pipelines_see_the_same_microbatches(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    alone, two = tmp_path / "alone", tmp_path / "two"
    assert pool.run(1, attempt, tree=packed(corpus, alone, {})) == [Outcome()]
    answers = pool.run(2, attempt_and_count, tree=packed(corpus, two, {"pipeline": 2, "virtual_pipeline": 2}))
    assert [outcome for outcome, _, _ in answers] == [Outcome()] * 2
    assert [made for _, made, _ in answers] == [2 * 16 + 22] * 2  # once for both chunks; held-out ones in pairs
    assert max(alive for _, _, alive in answers) <= 4 + AT_MOST  # those between two chunks of two stages
    assert losses_of(two) == pytest.approx(losses_of(alone), rel=1e-6)
    for one, other in zip(evaluations_of(alone), evaluations_of(two), strict=True):
        assert other == pytest.approx(one, rel=1e-6)

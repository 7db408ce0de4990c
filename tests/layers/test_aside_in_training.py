# SPDX-License-Identifier: Apache-2.0
"""What is done aside may be done as late as somebody waits for it: a training does not notice.

On a GPU a stream aside may be late; here work is put off until it is told to begin or waited for, by processes of a CPU
that exchange through files (`shared_boxes`). They make du at once; what is put off is to write it where it is read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

from lora_megatron.layers.aside import FOR_COPIES, FOR_THE_END, Aside, Work
from lora_megatron.layers.low_rank import Update
from lora_megatron.parallel.groups import Layout
from lora_megatron.training import step
from tests.comparison import Mismatch, compare
from tests.layers.shared_boxes import exchanging
from tests.layers.test_beside import ADAPTED, AGAIN
from tests.pool import Pool
from tests.twin import Experiment, Record, train_twin, train_twins

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="boxes that stand in for a GPU's")

EVERY = replace(ADAPTED, method={"targets": dict.fromkeys(("q", "v", "o", "fc1", "fc2"), 2)})


GRADIENTS: Any = Update.gradients


@contextlib.contextmanager
def late() -> Iterator[list[str]]:
    """Within, work waits as in a capture; yields what has been put off, by name."""
    put_off = list[str]()

    def do(self: Aside, work: Work) -> None:
        self.start()
        self._next = work
        put_off.append(getattr(work, "func", work).__name__)

    def start(self: Aside) -> None:
        work, self._next = self._next, None
        if work is not None:
            work()

    def gradients(self: Update, flat: torch.Tensor) -> Any:
        du, dbs = GRADIENTS(self, flat)
        if not self.aside:
            return du, dbs
        read = torch.full_like(du, torch.nan)
        FOR_COPIES.do(partial(read.copy_, du))
        return read, dbs

    patches = {Aside: {"do": do, "start": start}, Update: {"gradients": gradients}}
    with contextlib.ExitStack() as stack:
        for owner, methods in patches.items():
            stack.enter_context(mock.patch.multiple(owner, **methods))
        yield put_off


def train_late(experiment: Experiment, unheeded: tuple[Any, str] | None = None) -> tuple[Record | None, set[str], bool]:
    """With a wait that is none, if one is named; whether anything was still to be done when a microbatch began."""
    left, forward_step = False, step.forward_step

    def begin(*args: Any) -> Any:
        nonlocal left
        answer = forward_step(*args)
        left = left or FOR_THE_END._next is not None
        return answer

    owner, name = unheeded or (None, "")
    if isinstance(owner, str):
        owner = {"copies": FOR_COPIES, "step": step}[owner]
    with exchanging(), late() as put_off, contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(step, "forward_step", begin))
        if owner is not None:
            stack.enter_context(mock.patch.object(owner, name, return_value=None))
        return train_twin(experiment), set(put_off), left


@pytest.fixture(scope="module")
def twin(pool: Pool) -> Record:
    """Of one process."""
    alone = replace(EVERY, layout=Layout(), tp_comm_overlap=False)
    ((found,),) = pool.run(1, train_twins, experiments=[alone])
    return found


def test_a_training_that_does_it_late_is_the_same(pool: Pool, twin: Record) -> None:
    (record, put_off, _), _ = pool.run(2, train_late, experiment=EVERY)
    assert put_off == {"_add_product", "add_to", "copy_"}, "gradients of factors, the update of own rows, du"
    assert compare(record, twin) > 0


@pytest.mark.parametrize("unheeded", [None, ("step", "wait_for_all")], ids=str)
def test_nothing_is_held_through_the_next_microbatch(pool: Pool, unheeded: tuple[str, str] | None) -> None:
    """Where no exchange lets it begin."""
    alone = replace(EVERY, layout=Layout(), tp_comm_overlap=False)
    ((_, _, left),) = pool.run(1, train_late, experiment=alone, unheeded=unheeded)
    assert left is (unheeded is not None)


@pytest.mark.parametrize("target", ["q", "o", "fc1", "fc2"])
def test_so_is_one_with_one_projection_adapted(pool: Pool, target: str) -> None:
    """In layer 0, no product needs the gradient of what it reads, and du is exchanged alone."""
    experiment = replace(ADAPTED, method={"targets": {target: 2}}, **AGAIN)
    alone = replace(experiment, layout=Layout(), tp_comm_overlap=False)
    ((whole,),) = pool.run(1, train_twins, experiments=[alone])
    (record, _, _), _ = pool.run(2, train_late, experiment=experiment)
    assert compare(record, whole) > 0


@pytest.mark.parametrize("unheeded", [("step", "wait_for_all"), ("copies", "wait"), ("copies", "join")], ids=str)
def test_what_is_read_too_early_would_be_noticed(pool: Pool, twin: Record, unheeded: tuple[str, str]) -> None:
    (record, _, _), _ = pool.run(2, train_late, experiment=EVERY, unheeded=unheeded)
    with pytest.raises(Mismatch, match=r"^norm of step 0"):
        compare(record, twin)

# SPDX-License-Identifier: Apache-2.0
"""What is done aside may be done as late as somebody waits for it: a training does not notice.

On a GPU a stream aside may be late; here work is put off until it is told to begin or waited for, by processes of a CPU
that exchange through files (`shared_boxes`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch

from lora_megatron.layers.aside import Aside, Work
from lora_megatron.parallel.groups import Layout
from lora_megatron.training import step
from tests.comparison import Mismatch, compare
from tests.layers.shared_boxes import exchanging
from tests.layers.test_beside import ADAPTED
from tests.pool import Pool
from tests.twin import Record, train_twin, train_twins

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="boxes that stand in for a GPU's")

EVERY = replace(ADAPTED, method={"targets": dict.fromkeys(("q", "v", "o", "fc1", "fc2"), 2)})


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

    with mock.patch.object(Aside, "do", do), mock.patch.object(Aside, "start", start):
        yield put_off


def train_late(*, heeded: bool) -> tuple[Record | None, set[str]]:
    """With or without a wait for all of it before gradients are read."""
    ignored = contextlib.nullcontext() if heeded else mock.patch.object(step, "wait_for_all", return_value=None)
    with exchanging(), late() as put_off, ignored:
        return train_twin(EVERY), set(put_off)


@pytest.fixture(scope="module")
def twin(pool: Pool) -> Record:
    """Of one process."""
    alone = replace(EVERY, layout=Layout(), tp_comm_overlap=False)
    ((found,),) = pool.run(1, train_twins, experiments=[alone])
    return found


def test_a_training_that_does_it_late_is_the_same(pool: Pool, twin: Record) -> None:
    (record, put_off), _ = pool.run(2, train_late, heeded=True)
    assert put_off == {"_add_product", "add_to"}, "gradients of factors, and the update of own rows"
    assert compare(record, twin) > 0


def test_gradients_that_are_read_too_early_would_be_noticed(pool: Pool, twin: Record) -> None:
    (record, _), _ = pool.run(2, train_late, heeded=False)
    with pytest.raises(Mismatch, match=r"^norm of step 0"):
        compare(record, twin)

# SPDX-License-Identifier: Apache-2.0
"""What a pipeline stage sends stays where it is until it is sent, and no longer."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from lora_megatron.parallel import sent_outputs
from lora_megatron.parallel.groups import Layout, build_mesh
from lora_megatron.parallel.sent_outputs import UNDER_WAY
from lora_megatron.training import step
from lora_megatron.training.optimizer import wrap_ddp
from tests.pool import Pool
from tests.twin import Experiment, build_chunks, microbatch

MICROBATCHES, CHUNKS = 8, 4
LAYOUT = Layout(pipeline=2, virtual_pipeline=CHUNKS)


class Watched:
    """A send under way."""

    def __init__(self, work: Any, tensor: torch.Tensor, gone: list[bool]) -> None:
        self.work, self.storage, self.gone = work, StorageWeakRef(tensor.untyped_storage()), gone

    def wait(self) -> None:
        self.gone.append(self.storage.expired())
        self.work.wait()


def send_and_watch(kept: int, method: dict[str, Any]) -> tuple[list[bool], int]:
    """Of each send whether its memory was gone when it was waited for; and the most outputs that were alive at once."""
    experiment = Experiment(layout=LAYOUT, model={"preset": "tiny", "num_layers": 2 * CHUNKS}, method=method)
    build_mesh(LAYOUT, seed=1, timeout_minutes=2)
    chunks, _ = build_chunks(experiment)
    ddp = wrap_ddp(chunks, sharding="none", precision="fp32")
    gone: list[bool] = []
    alive: list[StorageWeakRef] = []
    most, isend, forward = 0, dist.isend, step.forward_step

    def watched_send(tensor: torch.Tensor, **where: Any) -> Watched:
        return Watched(isend(tensor=tensor, **where), tensor, gone)

    def watched_forward(sent: Any, *rest: Any) -> Any:
        nonlocal most
        output = forward(sent, *rest)
        alive.append(StorageWeakRef(output[0].untyped_storage()))
        most = max(most, sum(not each.expired() for each in alive))
        return output

    with (
        mock.patch.object(dist, "isend", watched_send),
        mock.patch.object(step, "forward_step", watched_forward),
        mock.patch.object(sent_outputs, "UNDER_WAY", kept),
    ):
        step.run_microbatches(ddp, [microbatch(experiment, first) for first in range(MICROBATCHES)])
    return gone, most


EVERYWHERE: dict[str, Any] = {"targets": {"q": 4}}
ABOVE: dict[str, Any] = {"targets": {}, "layers": {"6-7": {"q": 4}}}
"""So that outputs below need no gradient."""


@pytest.mark.parametrize(("kept", "method"), [(UNDER_WAY, EVERYWHERE), (UNDER_WAY, ABOVE), (1, EVERYWHERE)], ids=str)
def test_outputs_outlive_their_sends_and_not_by_much(pool: Pool, kept: int, method: dict[str, Any]) -> None:
    for gone, most in pool.run(2, send_and_watch, kept=kept, method=method):
        assert len(gone) > MICROBATCHES
        assert any(gone) == (kept == 1)
        assert most <= UNDER_WAY + 2, "of the 32 outputs of a stage"

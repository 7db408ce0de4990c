# SPDX-License-Identifier: Apache-2.0
"""What a pipeline stage sends stays where it is until it is sent, and what it receives until its backward pass."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.utils import get_attr_wrapped_model
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


def alive(storages: list[StorageWeakRef]) -> int:
    return sum(not each.expired() for each in storages)


def send_and_watch(kept: int, method: dict[str, Any]) -> tuple[list[bool], int, int]:
    """Of each send whether its memory was gone when it was waited for; and the most outputs, and the most tensors
    received, that were alive at once."""
    experiment = Experiment(layout=LAYOUT, model={"preset": "tiny", "num_layers": 2 * CHUNKS}, method=method)
    build_mesh(LAYOUT, seed=1, timeout_minutes=2)
    chunks, _ = build_chunks(experiment)
    ddp = wrap_ddp(chunks, sharding="none", precision="fp32")
    gone: list[bool] = []
    outputs: list[StorageWeakRef] = []
    inputs: list[StorageWeakRef] = []
    most, most_inputs, isend, forward = 0, 0, dist.isend, step.forward_step

    def watched_send(tensor: torch.Tensor, **where: Any) -> Watched:
        return Watched(isend(tensor=tensor, **where), tensor, gone)

    def watched_forward(sent: Any, batches: Any, model: Any) -> Any:
        nonlocal most, most_inputs
        received = get_attr_wrapped_model(model, "decoder").input_tensor
        output = forward(sent, batches, model)
        outputs.append(StorageWeakRef(output[0].untyped_storage()))
        most = max(most, alive(outputs))
        if received is not None:
            inputs.append(StorageWeakRef(received.untyped_storage()))
            most_inputs = max(most_inputs, alive(inputs))
        return output

    with (
        mock.patch.object(dist, "isend", watched_send),
        mock.patch.object(step, "forward_step", watched_forward),
        mock.patch.object(sent_outputs, "UNDER_WAY", kept),
    ):
        step.run_microbatches(ddp, [microbatch(experiment, first) for first in range(MICROBATCHES)])
    return gone, most, most_inputs


EVERYWHERE: dict[str, Any] = {"targets": {"q": 4}}
ABOVE: dict[str, Any] = {"targets": {}, "layers": {"6-7": {"q": 4}}}
"""So that outputs below need no gradient."""


@pytest.mark.parametrize(("kept", "method"), [(UNDER_WAY, EVERYWHERE), (UNDER_WAY, ABOVE), (1, EVERYWHERE)], ids=str)
def test_outputs_outlive_their_sends_and_not_by_much(pool: Pool, kept: int, method: dict[str, Any]) -> None:
    for rank, (gone, most, most_inputs) in enumerate(pool.run(2, send_and_watch, kept=kept, method=method)):
        assert len(gone) > MICROBATCHES
        assert any(gone) == (kept == 1)
        assert most <= UNDER_WAY + 2, "of the 32 outputs of a stage"
        under_way = 2 * (1 - rank) + 2 * (CHUNKS - 1) + 1
        assert most_inputs <= under_way + 1, "between their two passes, and one whose gradient is being sent"

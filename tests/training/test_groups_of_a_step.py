# SPDX-License-Identifier: Apache-2.0
"""Every group that has a collective in a training step is among those whose communicators NCCL makes beforehand."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from lora_megatron.parallel import groups
from lora_megatron.parallel.groups import Layout, build_mesh
from tests.pool import Pool
from tests.twin import Experiment, Run, own_batches, run_microbatches

# `agree` gathers objects too: they are made of these.
COLLECTIVES = (
    "all_reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "_all_gather_base",
    "_reduce_scatter_base",
)


def groups_used_and_known(experiment: Experiment) -> list[tuple[set[str], set[str]]]:
    """(group names that a step's collectives of several ranks went over, those known beforehand), of every rank."""
    build_mesh(experiment.layout, seed=1, timeout_minutes=2)
    run, used = Run(experiment), set[str]()

    def watched(original: Any) -> Any:
        def collective(*args: Any, **kwargs: Any) -> Any:
            found = [value for value in (*args, *kwargs.values()) if isinstance(value, dist.ProcessGroup)]
            group = found[0] if found else dist.group.WORLD
            if group.size() > 1:
                used.add(group.group_name)
            return original(*args, **kwargs)

        return collective

    with contextlib.ExitStack() as stack:
        for name in COLLECTIVES:
            if hasattr(dist, name):
                stack.enter_context(mock.patch.object(torch.distributed, name, watched(getattr(dist, name))))
        run.optimizer.zero_grad()
        loss = run_microbatches(run.ddp, own_batches(experiment, 0))
        run.optimizer.set_lr(run.section.lr)
        run.optimizer.step(loss.tokens)
    known = {group.group_name for _, group in groups.groups_of_a_step()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (used, known))
    return everyone


@pytest.mark.parametrize(
    ("layout", "sharding"),
    [
        (Layout(tensor=2, pipeline=2), "none"),
        (Layout(tensor=2, sequence=True), "megatron"),
        (Layout(pipeline=2, virtual_pipeline=2), "none"),
    ],
    ids=str,
)
def test_no_communicator_is_made_in_a_step(pool: Pool, layout: Layout, sharding: str) -> None:
    experiment = Experiment(layout=layout, optimizer={"sharding": sharding})
    for used, known in pool.run(4, groups_used_and_known, experiment=experiment)[0]:
        assert len(used) >= 2, "the step was watched"
        assert used <= known

# SPDX-License-Identifier: Apache-2.0
"""`parallel.stage_copies`: what it keeps, for how long, and what is said where it cannot go on."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.model_parallel_config import ModelParallelConfig
from torch import Tensor

from lora_megatron.errors import ConfigError
from lora_megatron.layers.exchange import Exchange, exchange_over
from lora_megatron.parallel import lanes, stage_copies
from lora_megatron.parallel.groups import Layout, build_mesh, stop
from lora_megatron.parallel.shared_box import all_made
from lora_megatron.parallel.stage_copies import NEXT, SLOTS, StageCopies, copies_over
from tests.layers.shared_boxes import exchanging
from tests.pool import Pool
from tests.training.shared_stages import copying


def two_stages() -> ModelParallelConfig:
    """Builds the mesh, too."""
    build_mesh(Layout(pipeline=2), seed=1, timeout_minutes=2)
    return ModelParallelConfig(pipeline_dtype=torch.float32, pipeline_model_parallel_size=2)


def leave_groups() -> list[int]:
    """How many communicators and exchanges there are before groups are left, and after."""
    config = two_stages()
    with copying(), exchanging():
        group = mpu.get_pipeline_model_parallel_group()
        made = copies_over(group, config), exchange_over(group)
        assert made == (copies_over(group, config), exchange_over(group)), "one of each"
        counts = [len(all_made(StageCopies)), len(all_made(Exchange))]
        stop()
        return [*counts, len(all_made(StageCopies)), len(all_made(Exchange))]


def test_who_leaves_the_groups_keeps_nothing_of_them(pool: Pool) -> None:
    assert pool.run(2, leave_groups) == [[1, 1, 0, 0]] * 2


def fail_in_a_step() -> tuple[str, str]:
    """What is raised by the step after one in which something went wrong, and by one after that."""
    config = two_stages()
    told = []
    with copying():
        copies = copies_over(mpu.get_pipeline_model_parallel_group(), config)
        with pytest.raises(KeyError), copies.step(64, config):
            raise KeyError
        for _ in range(2):
            with pytest.raises(RuntimeError) as caught, copies.step(64, config):
                pass
            told.append(str(caught.value))
    return told[0], told[1]


def test_no_step_follows_one_that_failed(pool: Pool) -> None:
    line = "a step has not come to its end, and left messages under way (parallel.pp_comm_copy): start anew"
    assert pool.run(2, fail_in_a_step) == [(line, line)] * 2


def let_go_early() -> list[int]:
    """Messages kept after two were sent and have arrived, and one more thing was asked for; and the chunks that the
    communicator is told of by each step's configuration."""
    rank = dist.get_rank()
    config = two_stages()
    with copying():
        copies = copies_over(mpu.get_pipeline_model_parallel_group(), config)
        chunks = copies.virtual_pipeline_model_parallel_size
        interleaved = replace(config, virtual_pipeline_model_parallel_size=2)
        with copies.step(64, interleaved):
            for _ in range(2):
                ahead = torch.ones(4) if rank == 0 else None
                copies._communicate(
                    tensor_send_next=ahead,
                    tensor_send_prev=None,
                    recv_prev=rank == 1,
                    recv_next=False,
                    tensor_shape=(4,),
                )
            kept = len(copies._sides[NEXT]._under_way)
            dist.barrier()
            for _, handle in copies._sides[NEXT]._under_way:
                handle.wait()
            copies._communicate(
                tensor_send_next=None, tensor_send_prev=None, recv_prev=False, recv_next=False, tensor_shape=(4,)
            )
            left = len(copies._sides[NEXT]._under_way)
        assert (chunks, copies.virtual_pipeline_model_parallel_size) == (None, 2)
    return [kept, left]


def test_what_has_arrived_is_not_kept_until_the_next_is_sent(pool: Pool) -> None:
    (kept, left), other = pool.run(2, let_go_early)
    assert kept <= SLOTS
    assert (left, other) == (0, [0, 0])


class Failed(NamedTuple):
    """What a rank saw of a step that failed with messages under way."""

    freed: int
    """Times that its streams were in a step that did not fail."""
    idle: bool
    """Whether nothing was left in them behind the one that did."""
    seconds: float
    received: list[list[float]]
    """Each message's values, in the end."""


def go_wrong(copies: StageCopies, error: BaseException, received: list[Tensor]) -> None:
    """Stage 0 sends twice what there is room for, asks for as many that never come, and fails. Stage 1 then takes what
    it finds, asks for as many again, and fails."""
    is_first, device = dist.get_rank() == 0, torch.cuda.current_device()
    if not is_first:
        dist.barrier()
    for number in range(2 * SLOTS):
        before, after, handles = copies._communicate(
            tensor_send_next=torch.full((4,), float(number), device=device) if is_first else None,
            tensor_send_prev=None,
            recv_prev=not is_first,
            recv_next=is_first,
            tensor_shape=(4,),
            wait_on_reqs=False,
        )
        tensor = after if is_first else before
        assert tensor is not None
        received.append(tensor.detach())
        if not is_first and number < SLOTS:
            assert handles is not None
            handles["recv_prev"].wait()
    raise error


def fail_with_messages_under_way(error: BaseException) -> Failed:
    config, received = two_stages(), list[Tensor]()
    with copying(), mock.patch.object(lanes, "PATIENCE_S", 0.1):
        copies = copies_over(mpu.get_pipeline_model_parallel_group(), config)
        with mock.patch.object(copies, "_free", wraps=copies._free) as free, copies.step(64, config):
            pass
        freed = free.call_count - 1  # when its kernel was loaded
        began = time.monotonic()
        with pytest.raises(type(error)), copies.step(64, config):
            go_wrong(copies, error, received)
        seconds = time.monotonic() - began
        idle = all(lane.is_idle() for side in copies._sides for lane in (side.outward, side.inward))
        if dist.get_rank() == 0:
            dist.barrier()
    return Failed(freed, idle, seconds, [tensor.tolist() for tensor in received] if idle else [])


def check_failed(ranks: list[Failed]) -> None:
    for rank, (freed, idle, seconds, received) in enumerate(ranks):
        assert (freed, idle) == (0, True), f"rank {rank}"
        assert seconds < lanes.LONGEST_S, f"rank {rank}"
        assert len(received) == 2 * SLOTS
        for message, values in enumerate(received):
            own = [value for value in values if not math.isnan(value)]
            assert all(rank == 1 and value == message for value in own), f"rank {rank}: {values} for message {message}"


ERRORS = [ConfigError("of this rank alone"), torch.OutOfMemoryError("no room"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_streams_of_a_failed_step_run_out(pool: Pool, error: BaseException) -> None:
    check_failed(pool.run(2, fail_with_messages_under_way, error=error))


def refuse_numbers() -> str:
    def refuse(*_: Any) -> None:
        raise RuntimeError("cuStreamWaitValue32_v2 failed with CUDA driver status 801\nand more")

    config = two_stages()
    with copying(), mock.patch.object(stage_copies.Box, "wait", refuse):
        copies = copies_over(mpu.get_pipeline_model_parallel_group(), config)
        with pytest.raises(ConfigError) as caught, copies.step(64, config):
            pass
    return str(caught.value)


def test_a_driver_that_refuses_is_told(pool: Pool) -> None:
    line = (
        "parallel.pp_comm_copy = true: streams of this GPU cannot write or wait for numbers (cuStreamWaitValue32_v2 "
        "failed with CUDA driver status 801): set parallel.pp_comm_copy=false"
    )
    assert pool.run(2, refuse_numbers) == [line, line]

# SPDX-License-Identifier: Apache-2.0
"""`parallel.pp_comm_copy`: stages that copy into each other's memory train as those that send.

    python -m pytest tests/training/test_stage_copies.py -m multigpu

Processes of a CPU copy through files (`shared_stages`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.model_parallel_config import ModelParallelConfig

from lora_megatron.config import parse_config
from lora_megatron.errors import ConfigError
from lora_megatron.layers.storage.choose import StorageFormat
from lora_megatron.methods.choose import choose_method
from lora_megatron.model.checks import check_plan
from lora_megatron.model.presets import resolve_shape
from lora_megatron.parallel.groups import MOST_QUEUES, QUEUES, Layout, build_mesh
from lora_megatron.parallel.shared_box import ALIGNMENT
from lora_megatron.parallel.stage_copies import (
    SLOTS,
    bytes_of,
    check_copies_here,
    copies_over,
    slot_of,
)
from lora_megatron.parallel.stream_values import BYTES
from tests.comparison import compare
from tests.pool import Pool
from tests.training.shared_stages import NOBODY_WAITS, copying
from tests.training.test_stage_copies_life import check_failed, fail_with_messages_under_way
from tests.twin import Experiment, Record, train_twins

GPUS = torch.cuda.device_count()
several_gpus = [pytest.mark.multigpu, pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")]
SHAPE = (5, 2, 8)


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """New processes for each test: torch remembers symmetric memory by a group's name, and names come again."""
    monkeypatch.setenv(QUEUES, str(MOST_QUEUES))
    pool = Pool(min(GPUS, 4), backend="nccl")
    yield pool
    pool.close()


class Step(NamedTuple):
    """What every stage sends in it each way."""

    count: int
    shape: tuple[int, ...] = SHAPE
    room: int = 0
    """Bytes for which there is to be room; not given: as its messages have."""


def message(number: int, sender: int, backward: bool, shape: tuple[int, ...]) -> torch.Tensor:
    """Recognisable."""
    value = 1000.0 * sender + 2 * number + backward
    return torch.full(shape, value, device=torch.cuda.current_device())


def pass_round(steps: Sequence[Step], how: dict[str, Any], one_way: bool = False) -> list[tuple[str, float, float]]:
    """In each step every stage sends so many messages each way round, started before any is waited for; what was
    received with another value than was sent: where, got, wanted.

    one_way: none goes back, nor from the last stage to the first.
    """
    size, rank = dist.get_world_size(), dist.get_rank()
    build_mesh(Layout(pipeline=size), seed=1, timeout_minutes=2)
    config = ModelParallelConfig(pipeline_dtype=torch.float32, pipeline_model_parallel_size=size)
    found = []
    with copying(**how):
        copies = copies_over(mpu.get_pipeline_model_parallel_group(), config)
        sends, receives = (not one_way or place < size - 1 for place in (rank, size - 1 - rank))
        for step, (count, shape, room) in enumerate(steps):
            with copies.step(room or message(0, 0, False, shape).nbytes, config) as given:
                assert given["p2p_communicator"] is copies
                started = []
                for number in range(count):
                    ahead, _, first = copies._communicate(
                        tensor_send_next=message(number, rank, False, shape) if sends else None,
                        tensor_send_prev=None,
                        recv_prev=receives,
                        recv_next=False,
                        tensor_shape=shape,
                        wait_on_reqs=False,
                    )
                    _, back, second = copies._communicate(
                        tensor_send_next=None,
                        tensor_send_prev=None if one_way else message(number, rank, True, shape),
                        recv_prev=False,
                        recv_next=not one_way,
                        tensor_shape=shape,
                        wait_on_reqs=False,
                    )
                    assert first is not None
                    assert second is not None
                    before, after = (rank - 1) % size, (rank + 1) % size
                    started += [
                        (f"step {step} forward {number}", ahead, first.get("recv_prev"), before, number, False),
                        (f"step {step} backward {number}", back, second.get("recv_next"), after, number, True),
                    ]
                for name, tensor, handle, sender, number, backward in started:
                    if handle is None:
                        continue
                    handle.wait()
                    assert tensor is not None
                    assert tensor.requires_grad
                    wanted = message(number, sender, backward, shape)
                    if not torch.equal(tensor.detach(), wanted):
                        found.append((name, float(tensor.detach().mean()), float(wanted.mean())))
        assert all(not side._under_way for side in copies._sides)  # nothing sent is kept
    return found


GROWING = [Step(3 * SLOTS + 1), Step(3 * SLOTS + 1, room=1000)]


@pytest.mark.parametrize(
    ("world", "delay"),
    [(2, 0.0), (2, 0.002), (3, 0.001)],
)
def test_every_message_comes_whole_and_in_order(pool: Pool, world: int, delay: float) -> None:
    assert pool.run(world, pass_round, steps=GROWING, how={"delay": delay}) == [[]] * world


SMALL, LARGE = (64, 64), (128, 128)


def test_sizes_may_change_from_step_to_step(pool: Pool) -> None:
    """A slow receiver still has to take a message out when the next step's larger one comes into the slot beside it."""
    room = 4 * LARGE[0] * LARGE[1]
    steps = [Step(0, LARGE, room), Step(2, SMALL, room), Step(1, LARGE, room), Step(1, SMALL), Step(2, LARGE)]
    assert pool.run(2, pass_round, steps=steps, how={"delay": 0.02}, one_way=True) == [[], []]


@pytest.mark.parametrize("world", [pytest.param(2, marks=several_gpus), pytest.param(4, marks=several_gpus)])
def test_it_does_between_gpus(nccl: Pool, world: int) -> None:
    if world > GPUS:
        pytest.skip(f"needs {world} CUDA devices")
    steps = [Step(40), Step(40, LARGE), Step(39, SMALL), Step(40, LARGE), Step(40)]
    assert nccl.run(world, pass_round, steps=steps, how={}) == [[]] * world


@pytest.mark.parametrize("world", [pytest.param(2, marks=several_gpus)])
def test_streams_of_a_failed_step_run_out_on_gpus(nccl: Pool, world: int) -> None:
    check_failed(nccl.run(world, fail_with_messages_under_way, error=ConfigError("of this rank alone")))


@pytest.mark.parametrize("forgotten", NOBODY_WAITS)
def test_a_missing_wait_is_missed(pool: Pool, forgotten: str) -> None:
    found, told = [], ""
    try:
        found = pool.run(2, pass_round, steps=[Step(4 * SLOTS)], how={"delay": 0.005, "forgotten": forgotten})
    except AssertionError as error:  # of the ranks: a message that was lost is waited for in vain
        told = str(error)
    assert any(found) or "never was" in told


EXPERIMENTS = [
    Experiment(method={"targets": {"q": 4, "k": 1, "v": 2, "o": 3, "fc1": 2, "fc2": 5}}),
    Experiment(model={"preset": "tiny-llama", "num_layers": 4}, recompute="full", steps=2, micro_batch_size=2),
]
STORED = Experiment(
    model={"preset": "tiny", "num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "ffn_hidden_size": 256},
    storage=StorageFormat("fp8", transposes=0),
    precision="bf16",
    steps=2,
)
LAYOUTS = {
    "pp2": Layout(pipeline=2),
    "pp2-vp2": Layout(pipeline=2, virtual_pipeline=2),
    "pp4": Layout(pipeline=4),
    "pp2-vp2-tp2-sp": Layout(pipeline=2, virtual_pipeline=2, tensor=2, sequence=True),
    "pp2-dp2": Layout(pipeline=2),
}


def train_copying(experiments: list[Experiment]) -> list[Record | None]:
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    with copying():
        return train_twins(experiments)


def check_training(pool: Pool, name: str) -> None:
    """As unsharded within rounding, and as the same layout that sends to the bit."""
    layout, world = LAYOUTS[name], 2 if name in ("pp2", "pp2-vp2") else 4
    experiments = [*EXPERIMENTS, STORED]
    if "dp2" in name:  # a microbatch for each rank and stage at least
        experiments = [replace(one, global_batch_size=8) for one in experiments]
    whole: list[Record] = pool.run(1, train_copying, experiments=experiments[:-1])[0]
    cut = [replace(one, layout=layout) for one in experiments]
    sent: list[Record] = pool.run(world, train_copying, experiments=cut)[0]
    copied: list[Record] = pool.run(world, train_copying, experiments=[replace(one, pp_comm_copy=True) for one in cut])[
        0
    ]
    for got, want in zip(copied, whole, strict=False):
        assert compare(got, want) > 20
    for got, want in zip(copied, sent, strict=True):
        assert got["complaints"] == []
        assert (got["eval"], got["loss"], got["norm"]) == (want["eval"], want["loss"], want["norm"])
        for step, values in enumerate(want["values"]):
            for key, value in values.items():
                assert torch.equal(got["values"][step][key], value), key


@pytest.mark.parametrize("name", ["pp2-vp2", pytest.param("pp2", marks=pytest.mark.slow)])
def test_training_of_two_stages(pool: Pool, name: str) -> None:
    check_training(pool, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pp4", "pp2-vp2-tp2-sp", "pp2-dp2"])
def test_training_of_four_ranks(pool: Pool, name: str) -> None:
    check_training(pool, name)


@pytest.mark.parametrize("name", [pytest.param(name, marks=several_gpus) for name in LAYOUTS])
def test_training_between_gpus(nccl: Pool, name: str) -> None:
    if name not in ("pp2", "pp2-vp2") and GPUS < 4:
        pytest.skip("needs 4 CUDA devices")
    check_training(nccl, name)


def test_one_stage_has_nobody_to_copy_to() -> None:
    config = parse_config({"model": {"preset": "gpt2-small"}, "parallel": {"pp_comm_copy": True}})
    shape = resolve_shape(config.model, tokenizer_vocab_size=100)
    with pytest.raises(ConfigError, match=r"parallel.pp_comm_copy = true .* set parallel.pipeline above 1"):
        check_plan(config, shape, choose_method(config.method, num_layers=shape.num_layers), 1)


def test_a_machine_or_an_environment_that_cannot_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"no CUDA device; set parallel.pp_comm_copy=false"):
        check_copies_here()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(os.environ, QUEUES, "1")
    with pytest.raises(ConfigError, match=rf"{QUEUES}=1: .* set {QUEUES}={MOST_QUEUES}"):
        check_copies_here()
    monkeypatch.setitem(os.environ, QUEUES, str(MOST_QUEUES))
    check_copies_here()


def test_the_box_is_as_large_as_planned() -> None:
    each = 50 * 2**20
    assert bytes_of(each) == 4 * each + ALIGNMENT
    assert [slot_of(bytes_of(size)) for size in (each, 1, 257)] == [each, 256, 512]
    assert 2 * 2 * SLOTS * BYTES <= ALIGNMENT  # room for all numbers

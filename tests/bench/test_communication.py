# SPDX-License-Identifier: Apache-2.0
"""The share of communication, on kernels written by hand and on a profiler that stands in for torch's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch

from lora_megatron.bench import communication
from lora_megatron.bench.communication import Kernel, communication_of, profile, union_seconds
from lora_megatron.bench.notes import communication_text, range_text

SECOND = 10**9
REDUCE, GATHER, SEND = (
    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
    "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
    "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)",
)
GEMM = "void cutlass::nvjet_hsh_128x256_64x4_2x1_v_bz_coopB_TNT"


def kernel(name: str, start: float, end: float) -> Kernel:
    return Kernel(name, (round(start * SECOND), round(end * SECOND)))


def test_a_union_counts_every_moment_once_in_any_order() -> None:
    spans = [(5, 6), (0, 4), (1, 2), (3, 5), (8, 9), (8, 9)]
    assert union_seconds((start * SECOND, end * SECOND) for start, end in spans) == 7
    assert union_seconds([]) == 0
    assert union_seconds([(3, 3)]) == 0


def test_shares_of_a_step_of_ten_seconds() -> None:
    """
    ..0123456789
    GEMM ####  ##
    NCCL   ####        all-reduce 2 to 6, of which 4 to 6 exposed; all-gather 5 to 6 on another stream
    SEND         #     8 to 9, exposed
    """
    kernels = [
        kernel(GEMM, 0, 4),
        kernel(REDUCE, 2, 6),
        kernel(GATHER, 5, 6),
        kernel(GEMM, 6, 8),
        kernel(SEND, 8, 9),
    ]
    found = communication_of(kernels, steps=2, whole=10.0)
    facts = found.facts()
    assert facts["share"] == pytest.approx(0.5)
    assert facts["exposed_share"] == pytest.approx(0.3)
    assert facts["idle_share"] == pytest.approx(0.1)
    assert facts["step_seconds"] == 5.0
    assert facts["by_collective"] == {
        "all-gather": pytest.approx(0.1),
        "all-reduce": pytest.approx(0.4),
        "send and receive": pytest.approx(0.1),
    }


@pytest.mark.parametrize(
    ("name", "collective"),
    [
        (REDUCE, "all-reduce"),
        (GATHER, "all-gather"),
        (SEND, "send and receive"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", "reduce-scatter"),
        ("ncclSymkDevKernel_AllGather_LL", "all-gather"),
        ("ncclKernel_New", "other"),
        (GEMM, None),
        ("Memcpy DtoD (Device -> Device)", None),
        ("Memcpy PtoP (Device -> Device)", "copies between GPUs"),
        ("void at::native::all_reduce_like_nccl_kernel", None),
    ],
)
def test_what_is_a_collective(name: str, collective: str | None) -> None:
    assert Kernel(name, (0, 1)).collective == collective


@dataclass
class Event:
    """As torch's raw events."""

    text: str
    start: int
    duration: int
    device: Any = torch.autograd.DeviceType.CUDA
    mark: bool = False

    def name(self) -> str:
        return self.text

    def start_ns(self) -> int:
        return self.start * SECOND

    def duration_ns(self) -> int:
        return self.duration * SECOND

    def device_type(self) -> Any:
        return self.device

    def is_user_annotation(self) -> bool:
        return self.mark


class Profiler:
    """Stands in for torch.profiler.profile: a context with `profiler.kineto_results.events()`."""

    def __init__(self, events: list[Event]) -> None:
        self._events = events
        self.profiler = self.kineto_results = self

    def events(self) -> list[Event]:
        return self._events

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def profiled(events: list[Event], *, steps: int = 2) -> tuple[Any, int]:
    """What `profile` finds, and how many steps it took of 5 seconds each."""
    taken: list[float] = []

    def step() -> float:
        taken.append(5.0)
        return 5.0

    with (
        patch.object(torch.cuda, "is_available", lambda: True),
        patch.object(communication.torch.profiler, "profile", lambda activities: Profiler(events)),
    ):
        return profile(step, steps=steps), len(taken)


def test_only_work_of_the_device_counts() -> None:
    events = [
        Event(GEMM, 0, 4),
        Event(REDUCE, 3, 2),
        Event("nccl:all_reduce", 0, 10),
        Event("ProfilerStep#1", 0, 10, mark=True),
        Event("Context Sync", 0, 10),
        Event("cudaLaunchKernel", 0, 10, device=torch.autograd.DeviceType.CPU),
    ]
    found, taken = profiled(events)
    assert taken == 2
    assert (found.whole, found.communicating, found.exposed, found.busy) == (10.0, 2.0, 1.0, 5.0)


def test_what_an_exchange_does_is_communication() -> None:
    events = [
        Event(GEMM, 0, 4),
        Event("Memcpy DtoD (Device -> Device)", 4, 1),  # inside this GPU
        Event("Memcpy PtoP (Device -> Device)", 2, 4),
        Event("c10d::symmetric_memory::barrier_kernel(unsigned int**)", 6, 1),
    ]
    found, _ = profiled(events)
    assert (found.communicating, found.exposed, found.busy) == (5.0, 2.0, 7.0)
    assert found.by_collective == {"copies between GPUs": 4.0, "barrier": 1.0}


def test_nothing_seen_and_nothing_asked_is_no_number() -> None:
    assert profiled([]) == (None, 2)
    assert profiled([Event(GEMM, 0, 4)], steps=0) == (None, 0)
    assert profile(lambda: pytest.fail("a CPU has no kernels to look at"), steps=2) is None


def test_the_sentence_of_a_report() -> None:
    one = communication_of([kernel(GEMM, 0, 6), kernel(REDUCE, 5, 8)], steps=1, whole=10.0).facts()
    other = communication_of([kernel(GEMM, 0, 6), kernel(REDUCE, 6, 10)], steps=1, whole=10.0).facts()
    assert communication_text([one, other]) == (
        "under the profiler kernels of NCCL and copies between GPUs ran 30.0% to 40.0% of a step's time, nothing "
        "beside them 20.0% to 40.0%, and nothing at all 0.0% to 20.0%; waiting for other ranks included."
    )
    assert range_text([0.25]) == "25.0%"

# SPDX-License-Identifier: Apache-2.0
"""Weights turned round that come back from the host are those that went there, in whatever order they are read.

python -m pytest tests/layers/test_host_transposes.py -m "gpu or not gpu"
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Iterator, Sequence
from unittest import mock

import pytest
import torch

from lora_megatron.errors import ConfigError
from lora_megatron.layers.storage import host_transposes
from lora_megatron.layers.storage.fp8 import FP8, StoredFp8, transposed_fp8
from lora_megatron.layers.storage.host_transposes import HostTransposes, places
from tests.gpus import one_gpu

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=one_gpu)]


def stored(sizes: Sequence[int], device: str, generator: torch.Generator) -> list[StoredFp8]:
    found = []
    for size in sizes:
        one = StoredFp8(size, 64, device=torch.device(device), axis=0, group=None)
        one.store(torch.randn(size, 64, generator=generator).to(device))
        found.append(one)
    return found


def steady(weights: int, passes: int) -> Iterator[int]:
    """One after the other, again and again."""
    for _ in range(passes):
        yield from range(weights)


def grouped(weights: int, passes: int, chunk: int = 2, microbatches: int = 2) -> Iterator[int]:
    """As microbatches of a group read a chunk's, before the next chunk's."""
    for _ in range(passes):
        for start in range(0, weights, chunk):
            for _ in range(microbatches):
                yield from range(start, min(start + chunk, weights))


def shuffled(weights: int, passes: int) -> Iterator[int]:
    """Orders that nobody promised."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(passes):
        yield from torch.randint(0, weights, (weights,), generator=generator).tolist()


ORDERS = {
    "steady 2": (2, [*steady(2, 4)]),
    "steady 3": (3, [*steady(3, 5)]),
    "steady 5": (5, [*steady(5, 5)]),
    "steady 8": (8, [*steady(8, 4)]),
    "grouped 8": (8, [*grouped(8, 4)]),
    "grouped 7": (7, [*grouped(7, 4)]),
    "of one microbatch": (6, [*grouped(6, 4, microbatches=1)]),
    "shuffled": (7, [*shuffled(7, 6)]),
}


def weights_of(count: int, device: str = "cpu") -> list[StoredFp8]:
    return stored([48 + 16 * (n % 3) for n in range(count)], device, torch.Generator().manual_seed(3))


def read_all(
    host: HostTransposes, weights: list[StoredFp8], order: Sequence[int], *, forward: int = 0, slow: bool = True
) -> list[int]:
    """Of each read, in turn: whether it was not what it should be (2), or was turned round for it (1).

    The product of each is launched after it was asked for and before the next is, late on a GPU if it is `slow`: so a
    copy into what has not been read shows. forward: after so many reads a forward product comes; 0: none does.
    """
    read, found = list[torch.Tensor](), list[int]()

    def turn(n: int) -> torch.Tensor:
        found[-1] = 1
        return transposed_fp8(weights[n].codes)

    for count, n in enumerate(order):
        if forward and count % forward == 0:
            host.forward_runs()
        found.append(0)
        codes = host.codes_of(weights[n], functools.partial(turn, n))
        if codes.is_cuda and slow:
            torch.cuda._sleep(1_000_000)
        read.append(codes.view(torch.uint8).clone())
    wanted = [transposed_fp8(one.codes).view(torch.uint8) for one in weights]
    return [how if codes.equal(wanted[n]) else 2 for how, codes, n in zip(found, read, order, strict=True)]


@pytest.mark.parametrize("forward", [0, 2])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", ORDERS)
def test_each_is_read_as_it_is(order: str, device: str, forward: int) -> None:
    count, reads = ORDERS[order]
    assert max(read_all(HostTransposes(2), weights_of(count, device), reads, forward=forward)) == 1


@pytest.mark.parametrize(("count", "chunk"), [(5, 2), (6, 3), (7, 2), (8, 2), (3, 2), (4, 2), (12, 4)])
def test_from_the_second_pass_on_each_has_come_before_it_is_asked_for(count: int, chunk: int) -> None:
    """Where forward passes come between; where none does, every second one."""
    for microbatches in (1, 2):
        once = [*grouped(count, 1, chunk, microbatches)]
        host, weights = HostTransposes(chunk), weights_of(count)
        passes = [read_all(host, weights, once, forward=chunk) for _ in range(5)]
        assert sum(passes[0]) == count
        # In the second pass the first weights are asked for before anybody knew that they come again.
        assert sum(passes[1]) <= chunk, (count, microbatches)
        assert passes[2:] == [[0] * len(once)] * 3, (count, microbatches)
        for _ in range(3):
            host.forward_runs()
            turned = [n for n, how in zip(once, read_all(host, weights, once), strict=True) if how]
        sent_for_by_the_first = range(chunk, 2 * chunk)
        others = [n for n in range(count) if n % 2 and n not in sent_for_by_the_first]
        assert turned == (others if count > places(chunk) else []), (count, microbatches)


def test_a_copy_over_what_is_being_read_would_be_noticed() -> None:
    """The checks above can fail: where there is no room for what follows, it comes over what is read."""
    for rooms, worst in ((places(2), 1), (1, 2)):
        host = HostTransposes(2)
        del host._slots[rooms:]
        assert max(read_all(host, weights_of(5), [*steady(5, 3)], forward=2)) == worst


@pytest.mark.parametrize("order", ["steady 8", "grouped 7", "shuffled"])
@pytest.mark.parametrize("waits", [pytest.param(waits, marks=one_gpu) for waits in (True, False)])
def test_a_copy_that_comes_late_is_waited_for(order: str, waits: bool) -> None:
    """And not to wait would be noticed."""
    count, reads = ORDERS[order]
    host, weights = HostTransposes(2), weights_of(count, "cuda")
    read_all(host, weights, range(count))  # with copies of their own, that all streams there are have been made
    send_for = host._send_for

    def late(place: int, *, reading: int) -> None:
        assert host._stream is not None
        with torch.cuda.stream(host._stream):
            torch.cuda._sleep(20_000_000)
        send_for(place, reading=reading)

    wait_event = torch.cuda.Stream.wait_event

    def wait(stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        if waits or stream == host._stream:
            wait_event(stream, event)

    with mock.patch.object(host, "_send_for", late), mock.patch.object(torch.cuda.Stream, "wait_event", wait):
        worst = max(read_all(host, weights, [*reads, *reads], forward=2, slow=False))
    torch.cuda.synchronize()
    assert (worst < 2) == waits


@pytest.mark.parametrize("device", DEVICES)
def test_new_weights_are_turned_round_again(device: str) -> None:
    """One that is on the GPU, one that is on its way, and one that is on the host alone."""
    weights, host = weights_of(7, device), HostTransposes(2)
    for one in weights:
        one.host = one.told = host
    for _ in range(3):
        read_all(host, weights, [*steady(7, 1)], forward=2)
    read_all(host, weights, [0], forward=2)
    assert {0, 2, 4} & {slot.place for slot in host._slots} == {0, 2}
    generator = torch.Generator().manual_seed(9)
    for changed in (0, 2, 4):
        weights[changed].store(torch.randn(weights[changed].shape, generator=generator).to(device))
    found = [read_all(host, weights, [*steady(7, 1)], forward=2) for _ in range(4)]
    assert max(how for passed in found for how in passed) == 1
    assert [found[0][changed] for changed in (0, 2, 4)] == [1, 1, 1]
    assert found[2:] == [[0] * 7] * 2, "then they come from the host, as they are now"


def test_what_is_locked_goes_with_the_weights() -> None:
    """Not only when somebody looks for cycles: `_unlock` waits for the GPU."""
    weights, host = weights_of(3), HostTransposes(2)
    for one in weights:
        one.host = one.told = host
    read_all(host, weights, [*steady(3, 2)])
    gone = weakref.ref(host._copies[0])
    gc.disable()
    try:
        del weights, host, one
        assert gone() is None
    finally:
        gc.enable()


def test_a_host_without_memory_is_told_so() -> None:
    (one,) = stored([64], "cpu", torch.Generator())
    with (
        mock.patch.object(host_transposes.mmap, "mmap", side_effect=OSError("Cannot allocate memory")),
        pytest.raises(ConfigError, match=r"of which 0.00 GiB for the next of them are not there: set base.transp"),
    ):
        HostTransposes(2).codes_of(one, lambda: one.codes)


@pytest.mark.parametrize("_", [pytest.param(None, marks=one_gpu)])
def test_copies_are_locked_until_they_are_gone(_: None) -> None:
    codes = torch.zeros(640, 64, device="cuda").to(FP8)
    with mock.patch.object(host_transposes, "_unlock", wraps=host_transposes._unlock) as unlock:
        copy = host_transposes._on_host(codes)
        assert copy.is_pinned()
        address, part = copy.data_ptr(), copy[:1]
        del copy
        unlock.assert_not_called()
        del part
    unlock.assert_called_once_with(address)

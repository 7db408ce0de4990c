# SPDX-License-Identifier: Apache-2.0
"""Weights turned round that come back from the host are those that went there, in whatever order they are read.

python -m pytest tests/layers/test_host_transposes.py -m "gpu or not gpu"
"""

from __future__ import annotations

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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", ORDERS)
def test_each_is_turned_round_once_and_read_as_it_is(order: str, device: str) -> None:
    """The product of each is launched after it was asked for and before the next is, late on a GPU: so a copy into what
    has not been read shows."""
    count, reads = ORDERS[order]
    weights = stored([48 + 16 * (n % 3) for n in range(count)], device, torch.Generator().manual_seed(3))
    wanted = [transposed_fp8(one.codes).view(torch.uint8) for one in weights]
    host, turned = HostTransposes(2), list[int]()

    def turn(n: int) -> torch.Tensor:
        turned.append(n)
        return transposed_fp8(weights[n].codes)

    read = list(reads)
    found = []
    for n in read:
        codes = host.codes_of(weights[n], lambda n=n: turn(n))  # type: ignore[misc]  # mypy has no type for the default
        if device == "cuda":
            torch.cuda._sleep(1_000_000)
        found.append(codes.view(torch.uint8).clone())
    for n, codes in zip(read, found, strict=True):
        assert torch.equal(codes, wanted[n])
    assert sorted(turned) == sorted(set(read)), "each once"


def test_what_follows_is_on_its_way_before_it_is_asked_for() -> None:
    """In the second pass and after it nobody waits, whatever the number of weights."""
    for count, order in ((5, steady(5, 1)), (8, grouped(8, 1)), (6, grouped(6, 1, chunk=3))):
        weights = stored([64] * count, "cpu", torch.Generator().manual_seed(3))
        host, once = HostTransposes(3 if count == 6 else 2), list(order)
        for passed in range(4):
            for n in once:
                there = [slot.place for slot in host._slots]
                host.codes_of(weights[n], lambda: transposed_fp8(weights[n].codes))  # noqa: B023  # called at once
                if passed > 1:
                    assert n in there, (count, passed, n)


def test_a_copy_over_what_is_being_read_would_be_noticed() -> None:
    """The checks above can fail: where there is no room for what follows, it comes over what is read."""
    weights = stored([64] * 5, "cpu", torch.Generator().manual_seed(3))
    wanted = [transposed_fp8(one.codes).view(torch.uint8) for one in weights]
    for rooms, expected in ((places(2), False), (1, True)):
        host, wrong = HostTransposes(2), False
        del host._slots[rooms:]
        for n in steady(5, 3):
            codes = host.codes_of(weights[n], lambda: transposed_fp8(weights[n].codes))  # noqa: B023  # called at once
            wrong |= not torch.equal(codes.view(torch.uint8), wanted[n])
        assert wrong == expected


@pytest.mark.parametrize("device", DEVICES)
def test_new_weights_are_turned_round_again(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = stored([64] * 3, device, generator)
    host = HostTransposes(2)
    for one in weights:
        one.host = host
    grad = torch.randn(16, 64, generator=generator).to(device, torch.bfloat16 if device == "cuda" else torch.float32)

    def products() -> list[torch.Tensor]:
        return [one.input_gradient(grad) for one in weights]

    for _ in range(3):
        before = products()
    new = torch.randn(64, 64, generator=generator).to(device)
    weights[1].store(new)
    for _ in range(3):
        after = products()
        assert torch.equal(after[0], before[0])
        assert torch.equal(after[2], before[2])
        want = grad.float() @ new
        assert float((after[1].float() - want).norm() / want.norm()) < 0.1


def test_a_host_without_memory_is_told_so() -> None:
    (one,) = stored([64], "cpu", torch.Generator())
    with (
        mock.patch.object(host_transposes.torch, "empty", side_effect=RuntimeError("DefaultCPUAllocator")),
        pytest.raises(ConfigError, match=r"has no 0.00 GiB left for the next of them: set base.transposes=group"),
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

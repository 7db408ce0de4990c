# SPDX-License-Identifier: Apache-2.0
"""FP8 weights turned round once, kept in the host's memory, and brought back to the GPU before they are read again.

The backward products of a model read its weights always in the same order, layer by layer from the last to the first.
Whoever reads one here has the one that is read `ahead` places later brought meanwhile, by a copy engine: that takes
neither processors nor, to speak of, energy from the products, which turning a weight round does (of GPT-3 175B a layer
6% of its time for one microbatch of 2048 tokens). On the GPU are only the weights that are being read, and as many that
are to come.

What the order is, the first pass shows. A weight that nobody has sent for is turned round where it is, as it was then:
the codes that are read are the same in any case. While backward passes alone run, as at the end of a step, and at all
times where no pipeline's chunks take turns, every second one is: there is half the time for each, in which all of them
would not come.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from lora_megatron.errors import ConfigError


def places(ahead: int) -> int:
    """For so many weights there is room on the GPU: those that are read in a row, and those that follow."""
    return 2 * ahead


class _Slot:
    """Room on the GPU for one weight, and which it has."""

    def __init__(self) -> None:
        self.room = self.codes = torch.empty(0)
        self.place = -1
        self.has_come: torch.cuda.Event | None = None


class HostTransposes:
    """Those of one rank; read by one thread on one stream, and each multiplied with before the next one is asked for.

    ahead: how many weights are brought before they are asked for; as many as are read in a row before any is read
    again, or before a forward pass comes between. The GPU has room for them and for those that are being read.
    """

    def __init__(self, ahead: int) -> None:
        assert ahead > 1
        self._ahead = ahead
        self._places: dict[int, int] = {}
        """By a weight's id, in the order in which they were read first: weights have this, and what both have would
        stay locked until somebody looks for cycles."""
        self._copies: list[Tensor] = []
        """On the host, FP8 [in, out]."""
        self._stale: set[int] = set()
        self._knows_all = False
        self._in_a_row = 0
        """Read since the last forward product of any layer."""
        self._slots = [_Slot() for _ in range(places(ahead))]
        self._device = torch.device("cpu")
        self._stream: torch.cuda.Stream | None = None

    def forward_runs(self) -> None:
        """To be called of every forward product in FP8."""
        self._in_a_row = 0

    def codes_of(self, weight: object, turn: Callable[[], Tensor]) -> Tensor:
        """W^T [in, out] as FP8 on its device, to be read before the next weight is asked for; `turn` makes it.

        Raises:
            ConfigError: the host has no memory for a copy.
        """
        self._in_a_row += 1
        place = self._places.get(id(weight), len(self._copies))
        slot, codes = next((slot for slot in self._slots if slot.place == place), None), None
        if slot is None:
            codes = turn()
            if place == len(self._copies) or place in self._stale:
                self._keep(weight, place, codes)
            slot = self._vacate(place, reading=place)
        if slot.has_come is not None:
            torch.cuda.current_stream().wait_event(slot.has_come)
        if codes is not None:
            slot.codes.copy_(codes)
            slot.place = place
        self._send_for((place + self._ahead) % len(self._copies), reading=place)
        return slot.codes

    def forget(self, weight: object) -> None:
        """It has changed: turn it round again when it is read next."""
        place = self._places.get(id(weight))
        if place is not None:
            self._stale.add(place)
            for slot in (slot for slot in self._slots if slot.place == place):
                slot.place = -1

    def _keep(self, weight: object, place: int, codes: Tensor) -> None:
        if place == len(self._copies):
            if codes.is_cuda and self._stream is None:
                self._device, self._stream = codes.device, torch.cuda.Stream(codes.device)
            self._copies.append(_on_host(codes))
            self._places[id(weight)] = place
            self._knows_all = False
        self._copies[place].copy_(codes)
        self._stale.discard(place)

    def _send_for(self, place: int, *, reading: int) -> None:
        """Have a weight brought, unless it is here, or there would not be time for it."""
        self._knows_all |= reading == 0
        in_time = self._in_a_row <= self._ahead or place % 2 == 0
        is_here = any(slot.place == place for slot in self._slots)
        if is_here or not in_time or not self._knows_all or place in self._stale:
            return
        slot = self._vacate(place, reading=reading)
        if self._stream is None:
            slot.codes.copy_(self._copies[place])
        else:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                slot.codes.copy_(self._copies[place], non_blocking=True)
                slot.has_come = self._stream.record_event()
        slot.place = place

    def _vacate(self, place: int, *, reading: int) -> _Slot:
        """A slot with room for the weight, and none in it: one that had none, or the one that is read again last.

        That is none of the `ahead` to come and none of the `ahead` up to the one that is being read, which further
        microbatches of a group read again: there is room for so many and this one is not there.
        """
        count, last = len(self._copies), reading + self._ahead
        slot = max(self._slots, key=lambda slot: count if slot.place < 0 else (last - slot.place) % count)
        copy, slot.place = self._copies[place], -1
        if slot.room.numel() < copy.numel():
            slot.room = slot.codes = torch.empty(0)  # not two rooms at a time
            largest = max(each.numel() for each in self._copies)
            slot.room = torch.empty(largest, dtype=copy.dtype, device=self._device)
            if self._stream is not None:  # whoever is given this memory after us waits for the last copy
                slot.room.record_stream(self._stream)
        slot.codes = slot.room[: copy.numel()].view(copy.shape)
        return slot


def _on_host(codes: Tensor) -> Tensor:
    """Room for a copy, locked for copy engines if `codes` are on a GPU; unlocked when nobody has it any more.

    Not by torch's own pinned memory, which is as large as the next power of two; in large pages, where Linux has them,
    as locking takes a time for each page.
    """
    needed = f"{codes.numel() / 2**30:.2f} GiB"
    try:
        room = mmap.mmap(-1, codes.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise _no_room(f"{needed} for the next of them are not there") from error
    with contextlib.suppress(AttributeError, OSError):
        room.madvise(mmap.MADV_HUGEPAGE)
    copy = torch.frombuffer(room, dtype=torch.uint8).view(codes.dtype).view(codes.shape)
    if codes.is_cuda:
        status = torch.cuda.cudart().cudaHostRegister(copy.data_ptr(), copy.nbytes, 0)
        if int(status):
            raise _no_room(f"{needed} for the next of them could not be locked ({status})")
        weakref.finalize(copy.untyped_storage(), _unlock, copy.data_ptr()).atexit = False
    return copy


def _unlock(address: int) -> None:
    torch.cuda.synchronize()  # a copy from there may be under way
    torch.cuda.cudart().cudaHostUnregister(address)


def _no_room(what: str) -> ConfigError:
    return ConfigError(
        f"base.transposes = host keeps weights turned round in the host's memory, of which {what}: "
        "set base.transposes=group"
    )

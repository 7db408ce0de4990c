# SPDX-License-Identifier: Apache-2.0
"""FP8 weights turned round once, kept in the host's memory, and brought back to the GPU before they are read again.

The backward products of a model read its weights always in the same order, layer by layer from the last to the first.
Whoever reads one here has the one that is read `ahead` places later brought meanwhile, by a copy engine: that takes
neither processors nor, to speak of, energy from the products, which turning a weight round does (of GPT-3 175B a layer
6% of its time for one microbatch of 2048 tokens). On a GPU are only the weights that are being read, and as many that
are to come.

What the order is, the first pass shows, in which each is turned round on the GPU and copied to the host. Should it ever
be another one, a weight that has not come is waited for: the codes that are read are the same, in any order.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from lora_megatron.errors import ConfigError


def places(ahead: int) -> int:
    """For so many weights there is room on the GPU: those that are read in a row, and those that follow."""
    return 2 * ahead


class _Slot:
    """Room on the GPU for one weight, and which it has."""

    def __init__(self) -> None:
        self.room: Tensor | None = None
        self.place = -1
        self.codes: Tensor | None = None
        self.has_come: torch.cuda.Event | None = None

    def forget(self) -> None:
        self.place, self.codes = -1, None


class HostTransposes:
    """Those of one rank; read by one thread on one stream, and each multiplied with before the next one is asked for.

    ahead: how many weights are brought before they are asked for; as many as are read in a row before any is read
    again. The GPU has room for them and for those that are being read.
    """

    def __init__(self, ahead: int) -> None:
        assert ahead > 1
        self._ahead = ahead
        self._places: dict[Hashable, int] = {}
        """In the order in which they were read first."""
        self._copies: list[Tensor] = []
        """On the host, FP8 [in, out]."""
        self._stale: set[int] = set()
        self._slots = [_Slot() for _ in range(places(ahead))]
        self._device = torch.device("cpu")
        self._stream: torch.cuda.Stream | None = None

    def codes_of(self, weight: Hashable, turn: Callable[[], Tensor]) -> Tensor:
        """W^T [in, out] as FP8 on its device, to be read before the next weight is asked for; `turn` makes it.

        Raises:
            ConfigError: the host has no memory for a copy.
        """
        place = self._places.get(weight, -1)
        if place < 0 or place in self._stale:
            codes = turn()
            self._keep(weight, codes)
            return codes
        slot = self._with(place, reading=place)
        following = (place + self._ahead) % len(self._copies)
        if following not in self._stale:
            self._with(following, reading=place)
        if slot.has_come is not None:
            torch.cuda.current_stream().wait_event(slot.has_come)
        assert slot.codes is not None
        return slot.codes

    def forget(self, weight: Hashable) -> None:
        """It has changed: turn it round again when it is read next."""
        place = self._places.get(weight)
        if place is None:
            return
        self._stale.add(place)
        for slot in self._slots:
            if slot.place == place:
                slot.forget()

    def _keep(self, weight: Hashable, codes: Tensor) -> None:
        if weight not in self._places:
            if codes.is_cuda and self._stream is None:
                self._device, self._stream = codes.device, torch.cuda.Stream(codes.device)
            self._copies.append(_on_host(codes))
            self._places[weight] = len(self._copies) - 1
        place = self._places[weight]
        self._copies[place].copy_(codes)
        self._stale.discard(place)

    def _with(self, place: int, *, reading: int) -> _Slot:
        """The slot that has the weight, or to which it is on its way; `reading`: whose product is launched next."""
        return next((slot for slot in self._slots if slot.place == place), None) or self._fill(place, reading)

    def _fill(self, place: int, reading: int) -> _Slot:
        """Have the weight brought to where there is none, or the one that is read again last.

        That is none of the `ahead` to come and none of the `ahead` up to the one that is being read, which further
        microbatches of a group read again: there is room for so many and this one is not there.
        """
        copy, last = self._copies[place], reading + self._ahead
        count = len(self._copies)
        slot = max(self._slots, key=lambda slot: count if slot.place < 0 else (last - slot.place) % count)
        slot.place = place
        if slot.room is None or slot.room.numel() < copy.numel():
            largest = max(each.numel() for each in self._copies)
            slot.room = torch.empty(largest, dtype=copy.dtype, device=self._device)
            if self._stream is not None:  # whoever is given this memory after us waits for the last copy
                slot.room.record_stream(self._stream)
        slot.codes = slot.room[: copy.numel()].view(copy.shape)
        if self._stream is None:
            slot.codes.copy_(copy)
            return slot
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            slot.codes.copy_(copy, non_blocking=True)
            slot.has_come = self._stream.record_event()
        return slot


def _on_host(codes: Tensor) -> Tensor:
    """Room for a copy, locked for copy engines if `codes` are on a GPU; unlocked when nobody has it any more.

    Not by torch's own pinned memory, which is as large as the next power of two.
    """
    needed = f"{codes.numel() / 2**30:.2f} GiB"
    try:
        copy = torch.empty(codes.shape, dtype=codes.dtype)
    except RuntimeError as error:
        raise _no_room(f"has no {needed} left") from error
    if codes.is_cuda:
        status = torch.cuda.cudart().cudaHostRegister(copy.data_ptr(), copy.nbytes, 0)
        if int(status):
            raise _no_room(f"could not lock {needed} ({status})")
        weakref.finalize(copy.untyped_storage(), _unlock, copy.data_ptr()).atexit = False
    return copy


def _unlock(address: int) -> None:
    torch.cuda.synchronize()  # a copy from there may be under way
    torch.cuda.cudart().cudaHostUnregister(address)


def _no_room(what: str) -> ConfigError:
    return ConfigError(
        f"base.transposes = host keeps weights turned round in the host's memory, which {what} for the next of them: "
        "set base.transposes=group"
    )

# SPDX-License-Identifier: Apache-2.0
"""What `layers.exchange` does with the memory that GPUs share, done by processes of a CPU with files that they share.

A stream of a CPU does everything at once and in order, so what is tested is the exchange's own: which rows go where, in
which order they are added up, and that no rank writes what another has yet to read. One rank is slow at all it does,
so that a barrier which is missing is missed.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from lora_megatron.layers import exchange
from lora_megatron.layers.sequence_shards import SequenceShards
from lora_megatron.parallel import cpu_backend, shared_box

DELAY_S = 0.005
NO_BARRIER, NO_TURNS = "no barrier", "no turns"
"""Faults that a test of the exchange must notice."""


class SharedBox:
    """Stands in for a box of symmetric memory."""

    delay = 0.0
    barriers = 0
    """Of this process, in all boxes."""

    def __init__(self, group: dist.ProcessGroup, *, needed_by: str) -> None:
        self.group, self.size, self.parts = group, 0, list[Tensor]()
        told: list[Any] = [tempfile.mkdtemp()]
        dist.broadcast_object_list(told, group_src=0, group=group)
        self.folder = Path(told[0])

    def holding(self, size: int) -> bool:
        if self.size >= size:
            return False
        self.size = size
        (self.folder / f"{size}-{self.group.rank()}").write_bytes(bytes(size))
        dist.barrier(group=self.group)
        paths = [str(self.folder / f"{size}-{rank}") for rank in range(self.group.size())]
        self.parts = [torch.from_file(path, shared=True, size=size, dtype=torch.uint8) for path in paths]
        return True

    def at(self, rank: int, like: Tensor, place: int = 0) -> Tensor:
        if rank != self.group.rank():
            self._be_slow()
        end = place + like.numel() * like.element_size()
        return self.parts[rank][place:end].view(like.dtype).view(like.shape)

    def barrier(self) -> None:
        SharedBox.barriers += 1
        self._be_slow()
        dist.barrier(group=self.group)
        self._be_slow()

    def _be_slow(self) -> None:
        time.sleep(self.delay if self.group.rank() else 0.0)


@contextlib.contextmanager
def exchanging(*, delay: float = 0.0, fault: str = "") -> Iterator[None]:
    """Within, ranks of a CPU that are to overlap exchange through files; on GPUs nothing is changed."""
    if torch.cuda.is_available():
        yield
        return
    cpu_backend.install()

    original = SequenceShards.over

    def over(group: dist.ProcessGroup, *, device: torch.device, **how: Any) -> SequenceShards:
        return original(group, device=torch.device("meta" if device.type == "meta" else "cuda"), **how)

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(exchange, "Box", SharedBox))
        stack.enter_context(patch.object(shared_box, "_made", {}))
        stack.enter_context(patch.object(SequenceShards, "over", over))
        stack.enter_context(patch.object(SharedBox, "delay", delay))
        if fault == NO_BARRIER:
            stack.enter_context(patch.object(SharedBox, "barrier", lambda self: self._be_slow()))
        if fault == NO_TURNS:
            stack.enter_context(patch.object(exchange.Exchange, "_box", _box_without_turns))
        yield


def _box_without_turns(self: exchange.Exchange, kind: str, size: int) -> Any:
    box = self.boxes[kind]
    box.holding(size)
    return box

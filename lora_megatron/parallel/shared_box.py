# SPDX-License-Identifier: Apache-2.0
"""Memory that GPUs of one host let each other at: torch's symmetric memory, outside the caching allocator.

Copies from and into another GPU's box are done by copy engines, which take no multiprocessor. Ranks tell each other
what is there by a barrier of all of them, or one another alone by numbers in a box that their streams write and wait
for (`stream_values`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lora_megatron.errors import ConfigError
from lora_megatron.parallel import stream_values

ALIGNMENT = 256
"""Bytes between parts of a box."""
Kind = TypeVar("Kind")
_made: dict[tuple[type, dist.ProcessGroup], Any] = {}


def made_over(kind: type[Kind], group: dist.ProcessGroup, make: Callable[[], Kind]) -> Kind:
    """The one of its kind that a group has, made when it is first asked for: by all ranks at once, as it has boxes."""
    if (kind, group) not in _made:
        _made[kind, group] = make()
    found: Kind = _made[kind, group]
    return found


def all_made(kind: type[Kind]) -> list[Kind]:
    """Those of a kind, of all groups."""
    return [one for (its, _), one in _made.items() if its is kind]


def forget_all() -> None:
    """To be called when groups are left: what was made over them keeps them, and its boxes, no longer."""
    _made.clear()


def aligned(size: int) -> int:
    """`size` bytes, and what is left of the last `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Box:
    """Memory of the same size on every rank of a group, which all of them can read and write.

    Args:
        group: its ranks.
        needed_by: the option that asked for it, for messages.
    """

    def __init__(self, group: dist.ProcessGroup, *, needed_by: str) -> None:
        self.group, self.needed_by = group, needed_by
        self.memory: Tensor | None = None
        self.handle: Any = None
        self.older: list[tuple[Tensor, Any]] = []

    @property
    def size(self) -> int:
        """Bytes, the same on all ranks."""
        return 0 if self.memory is None else self.memory.numel()

    def holding(self, size: int) -> bool:
        """Make it at least `size` bytes, if it is not, and say whether it is another one now: for all ranks at
        once, as all have tokens of one size. Where that fails it stays the one it is.

        Raises:
            torch.OutOfMemoryError: this GPU has no room for it.
            ConfigError: the GPUs do not reach each other's memory.
        """
        if self.size >= size:
            return False
        # Twice its size at least, so that all old ones together are no larger than the new one, however often it grows.
        memory = self._symmetric(max(size, 2 * self.size))
        # Loaded by those who use it: importing it costs a second.
        from torch.distributed import _symmetric_memory as symmetric

        try:
            handle = symmetric.rendezvous(memory, self.group.group_name)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"{self.needed_by} = true: the GPUs of a group do not reach each other's memory "
                f"({reason}): set {self.needed_by}=false, or keep the group inside one host"
            ) from None
        if self.memory is not None:  # other ranks may still be reading the old one, and CUDA graphs go on using it
            self.older.append((self.memory, self.handle))
        self.memory, self.handle = memory, handle
        return True

    def at(self, rank: int, like: Tensor, place: int = 0) -> Tensor:
        """The tensor of `like`'s shape and type that lies in rank's box, `place` bytes from its beginning."""
        found: Tensor = self.handle.get_buffer(rank, like.shape, like.dtype, place // like.element_size())
        return found

    def barrier(self) -> None:
        """On the current stream: nothing behind it begins before all ranks have come to it."""
        self.handle.barrier(channel=0)

    def write(self, rank: int, place: int, value: int) -> None:
        """On the current stream: put the number in rank's box, after all that the stream did before."""
        stream_values.write(self.handle.buffer_ptrs[rank] + place, value)

    def wait(self, place: int, value: int) -> None:
        """On the current stream: nothing behind it begins before the number in this rank's box is `value`."""
        stream_values.wait(self.handle.buffer_ptrs[self.group.rank()] + place, value)

    def _symmetric(self, size: int) -> Tensor:
        """Bytes that other GPUs can be let at, outside torch's allocator, which does not give way by itself."""
        from torch.distributed import _symmetric_memory as symmetric

        device = torch.device("cuda", torch.cuda.current_device())
        try:
            return symmetric.empty(size, dtype=torch.uint8, device=device)
        except RuntimeError:
            torch.cuda.empty_cache()
        try:
            return symmetric.empty(size, dtype=torch.uint8, device=device)
        except RuntimeError as error:
            raise torch.OutOfMemoryError(f"no room for {size:,} bytes that GPUs share ({self.needed_by})") from error

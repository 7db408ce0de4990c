# SPDX-License-Identifier: Apache-2.0
"""`parallel.pp_comm_copy`: pipeline stages on GPUs of one host copy into each other's memory what they send.

NCCL sends and receives with kernels. One that waits for its peer, or copies, holds multiprocessors, and a product that
runs beside it and had counted on all of them ends later by as long as that takes. Copy engines take none.

Each rank has a box with an inbox for each neighbour, of `SLOTS` messages, and two numbers for each slot:

    busy    with the sender     1 from when it begins to copy until the receiver has taken the message out
    full    with the receiver   1 from when the message is there until the receiver begins to take it out

    sender      wait busy = 0;  busy <- 1;  copy into the peer's slot;  the peer's full <- 1
    receiver    wait full = 1;  full <- 0;  copy out of the slot;       the peer's busy <- 0

Each direction has a stream of its own on each side, in which messages keep the order of megatron-core's schedule: the
same on both sides. The number of the slot starts at 0 in every step; every message of a step is taken out in it.

A step that ends in an exception leaves streams waiting on this rank, and on its neighbours:

    outward     for busy = 0, behind messages that the neighbour does not take out any more
    inward      for full = 1, where it does not send any more; the main stream waits for what was to be received

All of these numbers are in the waiting rank's own box, so each rank can end its own, and does once its own step has
failed (`run_out`). A rank whose step has not failed is ended as after any other that is lost: by its launcher or
watchdog, which wait for no stream. Until then it should not take what such streams still bring for messages: messages
that are not there yet become NaN first. A message that the main stream computes later may still arrive in an older
one's place, but nobody takes an optimizer's step, which ends in collectives of all stages, without the rank that has
failed.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from lora_megatron.errors import ConfigError
from lora_megatron.parallel.groups import MOST_QUEUES, QUEUES
from lora_megatron.parallel.lanes import Handle, Lane, run_out
from lora_megatron.parallel.shared_box import ALIGNMENT, Box, aligned, made_over
from lora_megatron.parallel.stream_values import BYTES

OPTION = "parallel.pp_comm_copy"
SLOTS = 2
"""Of an inbox: one is taken out while another comes in."""
PREVIOUS, NEXT = 0, 1
"""Sides of a stage."""
_FULL, _BUSY = 0, 1
_NAN_BYTE = 0xFF  # of which any floating-point number is NaN


def bytes_of(message: int) -> int:
    """What a rank's box takes for messages of so many bytes."""
    return ALIGNMENT + 2 * SLOTS * aligned(message)


def slot_of(box: int) -> int:
    """Bytes of each slot in a box of so many: where it is does not depend on a message, or its number would not guard
    it."""
    return (box - ALIGNMENT) // (2 * SLOTS) // ALIGNMENT * ALIGNMENT


def _number(kind: int, side: int, slot: int) -> int:
    """Where in a box that number is."""
    return BYTES * ((kind * 2 + side) * SLOTS + slot)


class _Nothing:
    """The handle of a message whose memory is kept until it is sent: there is nothing to wait for."""

    def wait(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _Neighbour:
    """Messages to and from the stage on one side."""

    def __init__(self, box: Box, rank: int, side: int) -> None:
        """`rank`: the neighbour's in the group."""
        self.box, self.rank, self.side, self.opposite = box, rank, side, 1 - side
        self.outward, self.inward = Lane(), Lane()
        self.sent = self.received = 0
        self._under_way: deque[tuple[Tensor, Handle]] = deque()

    def send(self, tensor: Tensor) -> Handle:
        """A tensor of any shape, which may be let go of at once and must not be written over."""
        slot, box = self.sent % SLOTS, self.box
        self.sent += 1
        message = tensor.detach().contiguous()
        own_busy, their_full = _number(_BUSY, self.side, slot), _number(_FULL, self.opposite, slot)
        place = self._place(self.opposite, slot, message)

        def copy() -> None:
            box.wait(own_busy, 0)
            box.write(box.group.rank(), own_busy, 1)
            box.at(self.rank, message, place).copy_(message, non_blocking=True)
            box.write(self.rank, their_full, 1)

        self._under_way.append((message, self.outward.run(copy)))
        self.let_go(SLOTS)
        return _Nothing()

    def receive(self, into: Tensor) -> Handle:
        """The next message, of the shape and type of `into`, which may be read once the handle has been waited for."""
        slot, box = self.received % SLOTS, self.box
        self.received += 1
        own_full, their_busy = _number(_FULL, self.side, slot), _number(_BUSY, self.opposite, slot)
        target = into.detach()
        place = self._place(self.side, slot, target)

        def copy() -> None:
            own = box.group.rank()
            box.wait(own_full, 1)
            box.write(own, own_full, 0)
            target.copy_(box.at(own, target, place), non_blocking=True)
            box.write(self.rank, their_busy, 0)

        return self.inward.run(copy)

    def end(self) -> None:
        """All messages that were sent are there, before whatever the current stream is given after this."""
        self.let_go(0)
        self.sent = self.received = 0

    def let_go(self, but: int) -> None:
        """Of the memory of messages that are there, and of all but the last so many others; the stream that made it
        waits for their copies."""
        while self._under_way and (len(self._under_way) > but or self._under_way[0][1].query()):
            _, handle = self._under_way.popleft()
            handle.wait()

    def free(self) -> None:
        """On the current stream: what this side's streams wait for is there, once more; and no message is one."""
        for message, _ in self._under_way:
            message.view(torch.uint8).fill_(_NAN_BYTE)
        for slot in range(SLOTS):
            self.box.write(self.box.group.rank(), _number(_BUSY, self.side, slot), 0)
            self.box.write(self.box.group.rank(), _number(_FULL, self.side, slot), 1)

    def _place(self, side: int, slot: int, message: Tensor) -> int:
        """Where in a box the inbox of that side has its slot, in bytes."""
        room = slot_of(self.box.size)
        assert message.nbytes <= room, f"a message of {message.nbytes:,} bytes in a slot of {room:,}"
        return ALIGNMENT + (side * SLOTS + slot) * room


class StageCopies(P2PCommunicator):
    """megatron-core's messages between stages, copied."""

    def __init__(self, group: dist.ProcessGroup, config: ModelParallelConfig) -> None:
        super().__init__(group, config)
        self.box = Box(group, needed_by=OPTION)
        rank, size = group.rank(), group.size()
        self._sides = [_Neighbour(self.box, (rank + step) % size, side) for side, step in ((PREVIOUS, -1), (NEXT, 1))]
        self._aside = Lane()  # now: torch's streams are a ring, and one made later may be one that waits
        self._in_step = False

    @contextlib.contextmanager
    def step(self, message: int, config: ModelParallelConfig) -> Iterator[dict[str, Any]]:
        """Within, what megatron-core's schedules are to be given for a step whose messages have at most so many bytes.

        Every rank of the group must enter it at the same time.

        Raises:
            torch.OutOfMemoryError, ConfigError: as `Box.holding`; or streams cannot write or wait for numbers.
            RuntimeError: an exception has ended a step before it.
        """
        if self._in_step:
            raise RuntimeError(f"a step has not come to its end, and left messages under way ({OPTION}): start anew")
        self.config = config
        self.virtual_pipeline_model_parallel_size = config.virtual_pipeline_model_parallel_size
        if self.box.holding(bytes_of(message)):
            self._clear_numbers()
            dist.barrier(group=self.pp_group)  # no slot is busy or full anywhere before anyone writes
        self._in_step = True
        try:
            yield {"p2p_communicator": self, "pg_collection": _groups()}
            for side in self._sides:
                side.end()
        except BaseException:
            with contextlib.suppress(Exception):  # what ended the step is what is to be told
                run_out(
                    [lane for side in self._sides for lane in (side.outward, side.inward)],
                    aside=self._aside,
                    free=self._free,
                )
            raise
        self._in_step = False

    def _free(self) -> None:
        """On the current stream: streams of a failed step need not wait for others, and bring NaN."""
        inboxes = torch.empty(self.box.size - ALIGNMENT, dtype=torch.uint8, device="meta")
        self.box.at(self.pp_group.rank(), inboxes, ALIGNMENT).fill_(_NAN_BYTE)
        for side in self._sides:
            side.free()

    def _clear_numbers(self) -> None:
        """Of this rank's box; and try whether streams can write those of the neighbours, and wait."""
        try:
            self._free()  # so that its kernel is there: to load one CUDA may wait for all streams
            self.box.at(self.pp_group.rank(), torch.empty(ALIGNMENT, dtype=torch.uint8, device="meta")).zero_()
            for side in self._sides:
                self.box.write(side.rank, _number(_FULL, side.opposite, 0), 0)
                self.box.wait(_number(_FULL, side.side, 0), 0)
        except (OSError, RuntimeError) as error:  # no library of the driver's, or it refuses
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"{OPTION} = true: streams of this GPU cannot write or wait for numbers ({reason}): set {OPTION}=false"
            ) from error
        torch.cuda.synchronize()

    def _communicate(
        self,
        *,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
        wait_on_reqs: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, dict[str, Handle] | None]:
        """As megatron-core's (0.16 to 0.19), by which all its sends and receives go: what was received from the stage
        before and from the one after, and handles by name."""
        for neighbour in self._sides:
            neighbour.let_go(SLOTS)
        handles: dict[str, Handle] = {}
        received: list[Tensor | None] = [None, None]
        for side, name, tensor in ((NEXT, "send_next", tensor_send_next), (PREVIOUS, "send_prev", tensor_send_prev)):
            if tensor is not None:
                handles[name] = self._sides[side].send(tensor)
        for side, name, is_asked in ((PREVIOUS, "recv_prev", recv_prev), (NEXT, "recv_next", recv_next)):
            if is_asked:
                into = torch.empty(
                    tuple(tensor_shape),
                    requires_grad=True,
                    device=torch.cuda.current_device(),
                    dtype=self.config.pipeline_dtype,
                )
                received[side] = into
                handles[name] = self._sides[side].receive(into)
        if not wait_on_reqs:
            return received[PREVIOUS], received[NEXT], handles
        for handle in handles.values():
            handle.wait()
        return received[PREVIOUS], received[NEXT], None


def copies_over(group: dist.ProcessGroup, config: ModelParallelConfig) -> StageCopies:
    """The one of a pipeline group, whose ranks must ask for it at the same time, the first time."""
    return made_over(StageCopies, group, lambda: StageCopies(group, config))


def check_copies_here() -> None:
    """Raise ConfigError where this process's GPU cannot do it."""
    if not torch.cuda.is_available():
        raise ConfigError(f"{OPTION} = true: this machine has no CUDA device; set {OPTION}=false")
    queues = os.environ.get(QUEUES, "")
    if queues != str(MOST_QUEUES):  # a stream that waits would hold up those that share its queue, for ever
        raise ConfigError(
            f"{OPTION} = true with {QUEUES}={queues or 'unset'}: streams that wait for another stage need queues of "
            f"their own; set {QUEUES}={MOST_QUEUES}, or leave it unset where lora-megatron starts"
        )


def _groups() -> ProcessGroupCollection:
    """What the schedules look up by themselves where they are given no communicator."""
    groups = ProcessGroupCollection()
    groups.tp = mpu.get_tensor_model_parallel_group()
    groups.cp = mpu.get_context_parallel_group()
    groups.pp = mpu.get_pipeline_model_parallel_group()
    groups.embd = mpu.get_embedding_group(check_initialized=False)
    groups.pos_embd = mpu.get_position_embedding_group(check_initialized=False)
    groups.dp = mpu.get_data_parallel_group()
    groups.dp_cp = mpu.get_data_parallel_group(with_context_parallel=True)
    groups.tp_dp_cp = mpu.get_tensor_and_data_parallel_group(with_context_parallel=True)
    return groups

# SPDX-License-Identifier: Apache-2.0
"""A rank whose peer has gone says so in a line: what gloo, NCCL and the store report about it is a traceback."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch
import torch.distributed as dist

from lora_megatron.errors import LostRankError, OutOfMemoryAlone, UserError

# What the backends say when the other side is gone or silent. What else they say (an invalid call, no memory) is a bug.
_SIGNS = re.compile(
    r"closed by peer|reset by peer|broken pipe|timed? ?out|connection (was )?(closed|refused|reset)|failed to recv"
    r"|remote process exited|ncclRemoteError|ncclSystemError|communicator was aborted|connection failure"
    r"|no route to host|socket (error|closed)|wait for the server|unexpected end of",
    re.IGNORECASE,
)
_BACKENDS = re.compile(r"gloo|nccl|store|socket|process ?group|collective|watchdog|peer", re.IGNORECASE)


def is_lost_contact(error: BaseException) -> bool:
    """Whether an exception of a collective or of the store means that another rank does not answer any more."""
    if isinstance(error, UserError) or not isinstance(error, RuntimeError | dist.DistError):
        return False
    text = str(error)
    return bool(_SIGNS.search(text)) and (isinstance(error, dist.DistError) or bool(_BACKENDS.search(text)))


@contextlib.contextmanager
def loss_as_error(
    *,
    lower: str = "lower data.micro_batch_size, set train.recompute=full",
    again: str = "start again with run.resume=auto",
) -> Iterator[None]:
    """Within, losing contact with another rank raises LostRankError, and running out of memory OutOfMemoryAlone.

    lower: what to do for less memory; again: how to go on.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryAlone(
            f"rank {dist.get_rank()} is out of GPU memory ({'. '.join(str(error).split('. ')[:2])}): "
            f"{lower}, or cut the model more (`lora-megatron plan` helps)"
        ) from error
    except Exception as error:
        if not is_lost_contact(error):
            raise
        sign = _SIGNS.search(str(error))
        assert sign is not None
        raise LostRankError(
            f"lost contact with another rank ({sign[0]}): it failed (its own log says why), was killed, or its machine "
            f"is gone; {again}"
        ) from error

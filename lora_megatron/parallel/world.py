# SPDX-License-Identifier: Apache-2.0
"""Being one of the ranks that torchrun started: how a process joins them, and how it leaves whatever happens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lora_megatron.errors import LostRankError, Preempted, UserError
from lora_megatron.parallel import groups
from lora_megatron.parallel.peers import loss_as_error


@contextlib.contextmanager
def in_world(*, timeout_minutes: float = 30.0, streams_wait: bool = False, **advice: str) -> Iterator[None]:
    """Within, this process is one of the ranks torchrun started (alone under plain python).

    A rank that is lost, or is out of memory, is a LostRankError; streams_wait: see `groups.join_world`, advice:
    `loss_as_error`.
    """
    groups.join_world(timeout_minutes=timeout_minutes, streams_wait=streams_wait)
    try:
        with loss_as_error(**advice):
            yield
    except LostRankError:  # whatever waits for the others would wait for ever
        raise
    except (UserError, Preempted):  # all ranks are here, so none waits for another
        groups.stop()
        raise
    groups.stop()

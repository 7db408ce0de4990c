# SPDX-License-Identifier: Apache-2.0
"""A command as one of the ranks that torchrun started, which can be told to stop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lora_megatron.config import Config
from lora_megatron.parallel import stopping
from lora_megatron.parallel.agree import require_equal
from lora_megatron.parallel.world import in_world


@contextlib.contextmanager
def joined(config: Config, **advice: str) -> Iterator[None]:
    """Within, this process is one of the ranks torchrun started (alone under plain python) and listens to signals.

    All ranks have the same configuration, or all raise. A rank that is lost, or is out of memory, is a LostRankError;
    advice: see `loss_as_error`.
    """
    options = config.parallel
    world = in_world(timeout_minutes=options.timeout_minutes, streams_wait=options.pp_comm_copy, **advice)
    with stopping.listening(), world:
        require_equal("the configuration", config.model_dump_json())
        yield

# SPDX-License-Identifier: Apache-2.0
"""Outputs of a pipeline stage, which nobody reads any more once they are sent.

Until its backward pass autograd holds an output for what it knows of how it was made, and with it values that no
backward pass asks for: at GPT-3's width 50 MB each, and of a stage that works in chunks dozens are under way.
megatron-core's own switch (deallocate_pipeline_outputs) lets go of them before an overlapping send has been waited for
(0.16), or has each send waited for at once (0.19).
"""

from __future__ import annotations

from collections import deque

from torch import Tensor

UNDER_WAY = 2
"""Outputs that may not be sent yet: megatron-core waits for a send after it has started the next one."""


class SentOutputs:
    """The last outputs of a stage in one step; the values of those before them are let go of."""

    def __init__(self) -> None:
        self._last: deque[Tensor] = deque()

    def add(self, output: Tensor) -> None:
        """`output`, of any shape, is about to be sent, and all but the last `UNDER_WAY` before it have been."""
        self._last.append(output)
        while len(self._last) > UNDER_WAY:
            sent = self._last.popleft()
            sent.data = sent.new_empty(()).expand(sent.shape)  # the shape is what its gradient is held against

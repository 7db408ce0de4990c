# SPDX-License-Identifier: Apache-2.0
"""Small work of a captured step beside its products, where the next of them does not wait for it.

Gradients of factors are read when the pass is over (`FOR_THE_END`), what goes beside tokens by copies of an exchange
(`FOR_COPIES`), an update of one rank's tokens after the product of the others' (`BESIDE_PRODUCT`). On the main stream
each would hold up the product after it for as long as it takes and two launches more. On a stream aside, of lower
priority (`training.cuda_graph`), it is done while the main stream leaves processors idle: an exchange, and ranks that
agree on FP8 scales, let it begin where they are about to wait for each other, as beside other small kernels it would
only take from them. Where nobody waits for other ranks it begins when the next comes.

Only while a CUDA graph is captured. There a fork costs no time of the host, and the graph says what depends on what;
eager steps do the same at once, and their results are the same to the bit.

On each stream one piece of work is under way at a time. It is held, and what it reads with it, until the next begins or
the main stream waits for it, so that no memory of it is given away before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Work = Callable[[], object]
"""It holds the tensors that it reads and writes (a `functools.partial` does)."""


class Aside:
    """A stream beside the main one, what is to begin on it and what is under way. Called from the main stream."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._next: Work | None = None
        self._held: Work | None = None
        self._done: torch.cuda.Event | None = None

    def do(self, work: Work) -> None:
        """Do it aside while a CUDA graph is captured, else at once. It begins when it is told to, when there is more to
        do or when somebody waits for it."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            self.start()
            self._next = work
        else:
            work()

    def start(self) -> None:
        """Let begin what has not, beside whatever the main stream is given after this."""
        if self._next is None:
            return
        work = self._next
        self._leave_last()
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
            self._done = self._stream.record_event()
        self._held = work

    def wait(self) -> None:
        """Nothing that the main stream is given after this begins before all is done."""
        self.start()
        self._leave_last()

    def join(self, stream: torch.cuda.Stream) -> None:
        """The same of another stream."""
        self.start()
        if self._done is not None:
            stream.wait_event(self._done)

    def forget(self) -> None:
        """To be called after a capture, whatever became of it: what it recorded means nothing outside."""
        self._next = self._held = self._done = None

    def _leave_last(self) -> None:
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)
        self.forget()


FOR_THE_END = Aside()
"""For what is read when the pass is over."""
FOR_COPIES = Aside()
"""For what an exchange's copies read: whoever hands it to one has made sure that it is an exchange."""
BESIDE_PRODUCT = Aside()
"""For what an exchange begins after a product and waits for after the next."""


def start_all() -> None:
    """Let begin all that has not; what goes beside a product has begun with it."""
    FOR_COPIES.start()
    FOR_THE_END.start()


def wait_for_all() -> None:
    """Nothing that the main stream is given after this begins before all is done; what goes beside a product is done
    with the next one."""
    FOR_COPIES.wait()
    FOR_THE_END.wait()


def forget_all() -> None:
    """To be called after a capture."""
    for each in (FOR_THE_END, FOR_COPIES, BESIDE_PRODUCT):
        each.forget()

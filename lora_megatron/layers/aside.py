# SPDX-License-Identifier: Apache-2.0
"""Small work of a captured step beside its products, where nothing in the next of them waits for it.

Gradients of factors are read when the pass is over, a gradient du by copies behind a product. On the main stream each
would hold up the product after it for as long as it takes and two launches more. On a stream of its own, of lower
priority (`training.cuda_graph`), it is done while the main stream leaves processors idle: it begins where that stream
is about to wait for other ranks (`start_aside`), as beside other small kernels it would only take from them.

Only while a CUDA graph is captured. There a fork costs no time of the host, and the graph says what depends on what;
eager steps do the same at once, and their results are the same to the bit.

One piece of work is under way at a time. It is held, and what it reads with it, until the next begins or the main
stream waits for it, so that no memory of it is given away before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Work = Callable[[], object]
"""It holds the tensors that it reads and writes (a `functools.partial` does)."""


class _Aside:
    """The stream, what is to begin on it and what is under way."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._next: Work | None = None
        self._held: Work | None = None
        self._done: torch.cuda.Event | None = None

    def do(self, work: Work) -> None:
        self.start()
        self._next = work

    def start(self) -> None:
        if self._next is None:
            return
        work = self._next
        self.wait()
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
            self._done = self._stream.record_event()
        self._held = work

    def wait(self) -> None:
        """Until what is under way is done; then let go of it."""
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)
        self.forget()

    def join(self, stream: torch.cuda.Stream) -> None:
        """`stream` waits for all that is under way; that is held on, as the main stream does not."""
        self.start()
        if self._done is not None:
            stream.wait_event(self._done)

    def forget(self) -> None:
        self._next = self._held = self._done = None


_ASIDE = _Aside()


def do_aside(work: Work) -> None:
    """Do the work aside while a CUDA graph is captured, else at once."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        _ASIDE.do(work)
    else:
        work()


def start_aside() -> None:
    """Let begin what has not, beside whatever the current stream is given after this. Without this it begins when
    there is more to do aside, or somebody waits for it."""
    _ASIDE.start()


def wait_for_aside() -> None:
    """Nothing that the current stream, the main one, is given after this begins before all work aside is done."""
    _ASIDE.start()
    _ASIDE.wait()


def join_aside(stream: torch.cuda.Stream) -> None:
    """From the main stream: the same of another one."""
    _ASIDE.join(stream)


def forget_aside() -> None:
    """To be called after a capture, whatever became of it: what it recorded means nothing outside."""
    _ASIDE.forget()

# SPDX-License-Identifier: Apache-2.0
"""What is done aside: when it begins, who waits for it, and for how long what it reads is held."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from lora_megatron.layers import aside
from lora_megatron.layers.aside import do_aside, forget_aside, join_aside, start_aside, wait_for_aside
from tests.gpus import one_gpu


class Read:
    """What work reads."""


class Streams:
    """Stands in for torch.cuda while a graph is captured: notes what every stream was given, in order."""

    def __init__(self) -> None:
        self.given: list[str] = []
        self.main = self.current = self.stream_named("main")

    def stream_named(self, name: str) -> SimpleNamespace:
        def record() -> str:
            self.given.append(f"{name} marks")
            return f"{name}'s mark"

        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: self.given.append(f"{name} waits for {other.name}"),
            wait_event=lambda event: self.given.append(f"{name} waits for {event}"),
            record_event=record,
        )

    def is_available(self) -> bool:
        return True

    def is_current_stream_capturing(self) -> bool:
        return True

    def current_stream(self) -> SimpleNamespace:
        return self.current

    def Stream(self) -> SimpleNamespace:
        return self.stream_named("aside")

    @contextlib.contextmanager
    def stream(self, stream: SimpleNamespace) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def work(self, name: str, read: Read | None = None) -> functools.partial[None]:
        return functools.partial(self._note, name, read)

    def _note(self, name: str, read: Read | None) -> None:
        self.given.append(f"{self.current.name} does {name}")


BEGINS = ["aside waits for main", "aside does one", "aside marks"]
WAITS = "main waits for aside's mark"


@pytest.fixture
def streams() -> Iterator[Streams]:
    found = Streams()
    with (
        mock.patch.object(aside, "torch", SimpleNamespace(cuda=found)),
        mock.patch.object(aside, "_ASIDE", aside._Aside()),
    ):
        yield found


def test_without_a_capture_work_is_done_at_once() -> None:
    done = list[str]()
    do_aside(lambda: done.append("one"))
    assert done == ["one"]


def test_work_begins_when_the_main_stream_is_about_to_wait(streams: Streams) -> None:
    do_aside(streams.work("one"))
    assert streams.given == []
    start_aside()
    start_aside()
    assert streams.given == BEGINS


def test_more_work_lets_the_last_begin_and_the_main_stream_waits_for_it_before_the_next(streams: Streams) -> None:
    do_aside(streams.work("one"))
    do_aside(streams.work("two"))
    assert streams.given == BEGINS
    start_aside()
    assert streams.given == [*BEGINS, WAITS, "aside waits for main", "aside does two", "aside marks"]


def test_whoever_waits_has_it_begin(streams: Streams) -> None:
    do_aside(streams.work("one"))
    wait_for_aside()
    wait_for_aside()
    assert streams.given == [*BEGINS, WAITS]


def test_another_stream_can_wait_and_the_main_one_goes_on(streams: Streams) -> None:
    do_aside(streams.work("one"))
    join_aside(streams.stream_named("copies"))  # type: ignore[arg-type]
    assert streams.given == [*BEGINS, "copies waits for aside's mark"]


def test_what_is_read_is_held_until_the_main_stream_has_waited(streams: Streams) -> None:
    read = Read()
    there = weakref.ref(read)
    do_aside(streams.work("one", read))
    del read
    join_aside(streams.stream_named("copies"))  # type: ignore[arg-type]
    assert there() is not None
    wait_for_aside()
    assert there() is None


def test_nothing_is_left_after_a_capture(streams: Streams) -> None:
    do_aside(streams.work("one"))
    start_aside()
    do_aside(streams.work("two"))
    forget_aside()
    wait_for_aside()
    assert streams.given == BEGINS


@pytest.mark.parametrize("_", [pytest.param(0, marks=one_gpu, id="gpu")])
def test_a_graph_does_it_anew_in_each_launch(_: int) -> None:
    x, total = torch.ones(1 << 20, device="cuda"), torch.zeros(1 << 20, device="cuda")
    graph = torch.cuda.CUDAGraph()
    main = torch.cuda.Stream(priority=-1)
    with torch.cuda.graph(graph, stream=main):
        for _ in range(3):
            do_aside(functools.partial(total.add_, x * 2))
            start_aside()
        wait_for_aside()
        out = total * 1
        forget_aside()
    for launches in (1, 2):
        graph.replay()
        assert out.eq(6 * launches).all()

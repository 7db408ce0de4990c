# SPDX-License-Identifier: Apache-2.0
"""What is done aside: when it begins, who waits for it, and for how long what it reads is held."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from lora_megatron.layers import aside
from lora_megatron.layers.aside import FOR_COPIES, FOR_THE_END, Aside, forget_all, start_all, wait_for_all
from tests.gpus import one_gpu


class Read:
    """What work reads."""


class Streams:
    """Stands in for torch.cuda while a graph is captured: notes what every stream was given, in order."""

    def __init__(self) -> None:
        self.given: list[str] = []
        self.main = self.current = self.stream_named("main")

    def stream_named(self, name: str) -> Any:
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
    with mock.patch.object(aside, "torch", SimpleNamespace(cuda=found)):
        yield found


def test_without_a_capture_work_is_done_at_once() -> None:
    done = list[str]()
    Aside().do(lambda: done.append("one"))
    assert done == ["one"]


def test_work_begins_when_it_is_told_to(streams: Streams) -> None:
    one = Aside()
    one.do(streams.work("one"))
    assert streams.given == []
    one.start()
    one.start()
    assert streams.given == BEGINS


def test_more_work_lets_the_last_begin_and_the_main_stream_waits_for_it_before_the_next(streams: Streams) -> None:
    one = Aside()
    one.do(streams.work("one"))
    one.do(streams.work("two"))
    assert streams.given == BEGINS
    one.start()
    assert streams.given == [*BEGINS, WAITS, "aside waits for main", "aside does two", "aside marks"]


def test_whoever_waits_has_it_begin(streams: Streams) -> None:
    one = Aside()
    one.do(streams.work("one"))
    one.wait()
    one.wait()
    assert streams.given == [*BEGINS, WAITS]


def test_another_stream_can_wait_and_the_main_one_goes_on(streams: Streams) -> None:
    one = Aside()
    one.do(streams.work("one"))
    one.join(streams.stream_named("copies"))
    assert streams.given == [*BEGINS, "copies waits for aside's mark"]


def test_what_is_read_is_held_until_the_main_stream_has_waited(streams: Streams) -> None:
    one, read = Aside(), Read()
    there = weakref.ref(read)
    one.do(streams.work("one", read))
    del read
    one.join(streams.stream_named("copies"))
    assert there() is not None
    one.wait()
    assert there() is None


def test_all_begin_and_all_are_waited_for_and_nothing_is_left_after_a_capture(streams: Streams) -> None:
    try:
        FOR_THE_END.do(streams.work("one"))
        FOR_COPIES.do(streams.work("two"))
        start_all()
        assert [given for given in streams.given if "does" in given] == ["aside does two", "aside does one"]
        wait_for_all()
        assert streams.given[-2:] == [WAITS, WAITS]
        FOR_THE_END.do(streams.work("three"))
    finally:
        forget_all()
    before = list(streams.given)
    wait_for_all()
    assert streams.given == before


@pytest.mark.parametrize("_", [pytest.param(0, marks=one_gpu, id="gpu")])
def test_a_graph_does_it_anew_in_each_launch(_: int) -> None:
    x, total = torch.ones(1 << 20, device="cuda"), torch.zeros(1 << 20, device="cuda")
    graph, one = torch.cuda.CUDAGraph(), Aside()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(priority=-1)):
        for _ in range(3):
            one.do(functools.partial(total.add_, x * 2))
            one.start()
        one.wait()
        out = total * 1
    for launches in (1, 2):
        graph.replay()
        assert out.eq(6 * launches).all()

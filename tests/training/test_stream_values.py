# SPDX-License-Identifier: Apache-2.0
"""What CUDA's driver is asked for by streams that write numbers and wait for them: a stand-in writes it down."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_megatron.parallel import stream_values


class Driver:
    """Of two GPUs, the second of which can flush."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.status = 0

    def cuDeviceGet(self, device: Any, index: ctypes.c_int) -> int:
        device._obj.value = 10 + index.value
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: ctypes.c_int, device: ctypes.c_int) -> int:
        self.asked.append(("attribute", attribute.value, device.value))
        value._obj.value = device.value - 10
        return 0

    def cuStreamWaitValue32_v2(self, *given: Any) -> int:
        self.asked.append(("wait", *(one.value for one in given)))
        return self.status

    def cuStreamWriteValue32_v2(self, *given: Any) -> int:
        self.asked.append(("write", *(one.value for one in given)))
        return self.status


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    driver = Driver()
    monkeypatch.setattr(stream_values, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    stream_values._flush.cache_clear()
    yield driver
    stream_values._flush.cache_clear()


def test_waits_flush_where_the_gpu_can(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, flags in ((0, 1), (1, 1 | 1 << 30)):
        monkeypatch.setattr(torch.cuda, "current_device", lambda index=index: index)
        driver.asked.clear()
        stream_values.wait(2**40, 1)
        stream_values.wait(2**40, 0)
        stream_values.write(2**40, 3)
        assert driver.asked == [
            ("attribute", 98, 10 + index),  # once
            ("wait", 7, 2**40, 1, flags),
            ("wait", 7, 2**40, 0, flags),
            ("write", 7, 2**40, 3, 0),
        ]


def test_what_the_driver_refuses_is_raised(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    driver.status = 801
    with pytest.raises(RuntimeError, match="cuStreamWaitValue32_v2 failed with CUDA driver status 801"):
        stream_values.wait(0, 1)
    with pytest.raises(RuntimeError, match="cuStreamWriteValue32_v2 failed with CUDA driver status 801"):
        stream_values.write(0, 1)

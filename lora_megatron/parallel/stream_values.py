# SPDX-License-Identifier: Apache-2.0
"""Numbers in device memory that a CUDA stream writes, or waits for: CUDA's driver has calls for it, torch has none.

A kernel that waits holds a multiprocessor, and a product that had counted on all of them takes as long as it waits.
Here the GPU's front end waits, and nothing is held but the stream.

What another GPU copied before it wrote the number must be seen by who waited for it. The writing stream fences what it
did before, and that is all a GPU relies on which cannot flush, while it waits, what others have written; one that can
(`CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES`) is asked to.
"""

from __future__ import annotations

import ctypes
import functools

import torch

_EQUAL, _AFTER_ALL_BEFORE = 1, 0  # CU_STREAM_WAIT_VALUE_EQ, CU_STREAM_WRITE_VALUE_DEFAULT
_FLUSH = 1 << 30  # CU_STREAM_WAIT_VALUE_FLUSH
_CAN_FLUSH = 98  # CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES
BYTES = 4
"""Of a number."""


def write(address: int, value: int) -> None:
    """On the current stream, behind all it was given before: `value` to an address that this GPU reaches."""
    _call("cuStreamWriteValue32_v2", address, value, _AFTER_ALL_BEFORE)


def wait(address: int, value: int) -> None:
    """On the current stream: what it is given after this begins once there is `value` at the address."""
    _call("cuStreamWaitValue32_v2", address, value, _EQUAL | _flush(torch.cuda.current_device()))


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _flush(index: int) -> int:
    """The flag with which that GPU's waits flush what others have written; 0 where it cannot."""
    device, can = ctypes.c_int(), ctypes.c_int()
    _check("cuDeviceGet", _driver().cuDeviceGet(ctypes.byref(device), ctypes.c_int(index)))
    status = _driver().cuDeviceGetAttribute(ctypes.byref(can), ctypes.c_int(_CAN_FLUSH), device)
    _check("cuDeviceGetAttribute", status)
    return _FLUSH if can.value else 0


def _call(name: str, address: int, value: int, flags: int) -> None:
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    _check(
        name,
        getattr(_driver(), name)(stream, ctypes.c_uint64(address), ctypes.c_uint32(value), ctypes.c_uint(flags)),
    )


def _check(name: str, status: int) -> None:
    if status:
        raise RuntimeError(f"{name} failed with CUDA driver status {status}")

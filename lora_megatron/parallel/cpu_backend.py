# SPDX-License-Identifier: Apache-2.0
"""Let megatron-core run where there is no GPU.

megatron-core names CUDA in a few dozen places (`torch.cuda.current_device()`, `device="cuda"`, RNG states). On a
machine without a GPU the same calls can mean the CPU, and its layers, schedules, DDP and optimizers then work over
gloo with results equal to an unsharded process. This file is the only place that knows; it replaces the functions
themselves, because a `TorchFunctionMode` would cost time on every operation and would not reach autograd's threads.
It is never used where CUDA is available.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "zeros_like", "empty_like")
_installed = False
# What megatron-core takes for the GPU's generator. It must not be the CPU's: under sequence parallelism megatron-core
# swaps the GPU's state around the whole block, and the CPU's carries what dropout masks are a function of.
_device_generator = torch.Generator()


class _Stream:
    """Stands in for a CUDA stream or event: a CPU executes in order, so there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: object = None) -> None:
        pass

    def record(self, stream: object = None) -> None:
        pass

    def wait(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same factory, with `device="cuda"` read as the CPU."""

    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return call


def _tensor_type(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type()` as megatron-core's optimizers expect it: they sort parameters by the name of the CUDA type."""

    @functools.wraps(original)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(answer, str) and caller.startswith("megatron.core.optimizer"):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    return type_


def install() -> None:
    """Redirect the CUDA symbols that megatron-core touches. Idempotent; refuses to act where CUDA works."""
    global _installed
    if _installed:
        return
    assert not torch.cuda.is_available(), "the CPU redirection is only for machines without a GPU"
    _installed = True

    cuda: dict[str, Any] = {
        "current_device": lambda: "cpu",
        "synchronize": lambda *args, **kwargs: None,
        "is_initialized": lambda: False,
        "empty_cache": lambda: None,
        "manual_seed": _device_generator.manual_seed,
        "get_rng_state": lambda *args, **kwargs: _device_generator.get_state(),
        "set_rng_state": lambda state, *args, **kwargs: _device_generator.set_state(state),
        "current_stream": _Stream,
        "default_stream": _Stream,
        "Stream": _Stream,
        "Event": _Stream,
        "stream": lambda stream: contextlib.nullcontext(),
    }
    for name, replacement in cuda.items():
        setattr(torch.cuda, name, replacement)
    with torch.device("meta"):
        torch.empty(0)  # torch lists the factories that obey `with device` on first use: let it list the originals
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: _device_generator.get_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: _device_generator.set_state(state)
    # Replacing methods is this file's purpose; mypy rightly calls it out.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.type = _tensor_type(torch.Tensor.type)  # type: ignore[method-assign]

# SPDX-License-Identifier: Apache-2.0
"""Elementwise work fused into one kernel on a GPU, by torch's compiler; the same function, uncompiled, on a CPU.

These casts and unpackings move memory and compute next to nothing: one pass over the data instead of five is what
there is to gain, and the compiler finds it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., object])


def fused(function: F) -> F:
    """`function` of tensors (the first positional argument is one), compiled at its first use on a GPU."""
    compiled = functools.cache(lambda: torch.compile(function, fullgraph=True, dynamic=False))

    @functools.wraps(function)
    def call(first: Tensor, *args: object, **kwargs: object) -> object:
        return (compiled() if first.is_cuda else function)(first, *args, **kwargs)

    return call  # type: ignore[return-value]  # the signature of `function`

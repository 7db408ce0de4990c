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

_SHAPES = 64  # a model has four linear layers and a run a few batch sizes; each is compiled once
F = TypeVar("F", bound=Callable[..., object])


def fused(function: F) -> F:
    """`function` of tensors (the first positional argument is one), compiled at its first use on a GPU."""
    compiled = functools.cache(lambda: torch.compile(function, fullgraph=True, dynamic=False))

    @functools.wraps(function)
    def call(first: Tensor, *args: object, **kwargs: object) -> object:
        if not first.is_cuda:
            return function(first, *args, **kwargs)
        with torch._dynamo.config.patch(recompile_limit=_SHAPES):
            return compiled()(first, *args, **kwargs)

    return call  # type: ignore[return-value]  # the signature of `function`

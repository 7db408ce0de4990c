# SPDX-License-Identifier: Apache-2.0
"""Steps between linear layers that keep their input and build everything else again in the backward pass.

A norm or an activation is bound by memory: computing its output anew costs a fraction of one product, keeping it costs
2 to 8 s b h bytes a layer (`planning.activations`). Its output also carries the recipe it was made by, so that an
adapter which reads it, and needs it for dA, keeps nothing either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Step(Protocol):
    """y = value(x, *parameters), the same for the same x, whatever a last parameter holds that is made for notes of
    what it found on the way; that is kept with the others."""

    def value(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        """y of x."""
        ...

    def input_gradient(self, x: Tensor, grad: Tensor, *parameters: Tensor | None) -> Tensor | None:
        """dL/dx from dL/dy by a kernel; None where there is none, and autograd through `value` tells."""
        ...


@dataclass(frozen=True)
class Recipe:
    """How a tensor was made, from tensors that are kept anyway: step.value(*ingredients)."""

    step: Step
    ingredients: tuple[Tensor | None, ...]


def rebuilt(step: Step, x: Tensor, *parameters: Tensor | None) -> Tensor:
    """step.value(x, *parameters), for whose backward pass x and the parameters alone are kept."""
    y: Tensor = _Rebuilt.apply(step, x, *parameters)
    y.recipe = Recipe(step, (x.detach(), *(None if p is None else p.detach() for p in parameters)))  # type: ignore[attr-defined]
    return y


def recipe_of(y: Tensor) -> Recipe | None:
    """How `y` was made, if it is exactly what `rebuilt` gave back (no view or sum of it)."""
    return getattr(y, "recipe", None)


@dataclass(frozen=True)
class _Itself:
    """The step of a tensor that nobody knows how to make: it is kept."""

    def value(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        return x

    def input_gradient(self, x: Tensor, grad: Tensor, *parameters: Tensor | None) -> Tensor | None:
        return grad


def recipe_or_itself(y: Tensor) -> Recipe:
    """How to have the values of `y` again: made as they were made, or, where nobody knows how, kept."""
    return recipe_of(y) or Recipe(_Itself(), (y.detach(),))


@contextlib.contextmanager
def passing_graph() -> Iterator[None]:
    """Within, autograd records a graph that lives for one operation only: a meter of what is kept for the backward
    pass does not count it."""

    def as_it_is(saved: Tensor) -> Tensor:
        return saved

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(as_it_is, as_it_is):
        yield


class _Rebuilt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Step, x: Tensor, *parameters: Tensor | None) -> Tensor:
        ctx.step = step
        ctx.save_for_backward(x, *parameters)
        return step.value(x, *parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *parameters = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        if not any(needed[1:]):
            grad_x = ctx.step.input_gradient(x, grads[0], *parameters) if needed[0] else None
            if grad_x is not None or not needed[0]:
                return None, grad_x, *(None for _ in parameters)
        inputs = [None if t is None else t.detach().requires_grad_(needs) for t, needs in _pairs(x, parameters, needed)]
        with passing_graph():
            y = ctx.step.value(*inputs)
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, grads[0]))
        return None, *(next(found) if t is not None and t.requires_grad else None for t in inputs)


def _pairs(x: Tensor, parameters: list[Any], needed: tuple[bool, ...]) -> list[tuple[Any, bool]]:
    return list(zip((x, *parameters), needed, strict=True))

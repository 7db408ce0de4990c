# SPDX-License-Identifier: Apache-2.0
"""Steps between linear layers that keep their input and build everything else again in the backward pass.

A norm or an activation is bound by memory: computing its output anew costs a fraction of one product, keeping it costs
2 to 8 s b h bytes a layer (`planning.activations`). Its output also carries the recipe it was made by, so that an
adapter which reads it, and needs it for dA, keeps nothing either.

A layer's input h goes two ways, into a norm and, as the residual, around a branch. A norm that hands h on gets both
gradients and gives their sum, by a kernel in the pass that it makes anyway; autograd would add them in one of its own.

    y = norm(h),  h' = h        dL/dh = (dy/dh)^T dL/dy + dL/dh'

megatron-core's layer knows nothing of h': it gives the addition h. So h carries how to find h' (`taken_over`).
"""

from __future__ import annotations

import contextlib
import weakref
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


class NormStep(Step, Protocol):
    """A step whose input goes around it too."""

    def input_gradient(
        self, x: Tensor, grad: Tensor, *parameters: Tensor | None, beside: Tensor | None = None
    ) -> Tensor | None:
        """As of `Step`, with `beside` added, of x's shape: dL/dx of what x is handed on to."""
        ...


@dataclass(frozen=True)
class Recipe:
    """How a tensor was made, from tensors that are kept anyway: step.value(*ingredients)."""

    step: Step
    ingredients: tuple[Tensor | None, ...]


def rebuilt(step: Step, x: Tensor, *parameters: Tensor | None) -> Tensor:
    """step.value(x, *parameters), for whose backward pass x and the parameters alone are kept."""
    y: Tensor = _Rebuilt.apply(step, x, *parameters)
    return _with_recipe(y, step, x, *parameters)


def rebuilt_beside_residual(step: NormStep, x: Tensor, *parameters: Tensor | None) -> Tensor:
    """The same of an x that is the residual too: whoever adds that asks `taken_over` for it."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return rebuilt(step, x, *parameters)
    y, residual = _RebuiltBesideResidual.apply(step, x, *parameters)
    # Python's collector does not look into graphs: x -> residual -> what made it -> x would stay for ever where nobody
    # takes it over. So y has it, which the layer holds while its branch runs, and x only knows where it is.
    y.handed_on, x.residual = residual, weakref.ref(residual)  # type: ignore[attr-defined]  # our own notes on tensors
    return _with_recipe(y, step, x, *parameters)


def taken_over(x: Tensor) -> Tensor:
    """In the place of x, as the residual: what the norm that read x last handed on, once, if its output is still there;
    else x itself."""
    left = vars(x).pop("residual", None)
    handed_on = None if left is None else left()
    return x if handed_on is None else handed_on


def _with_recipe(y: Tensor, step: Step, x: Tensor, *parameters: Tensor | None) -> Tensor:
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
        return None, *_by_autograd(ctx.step, grads[0], (x, *parameters), needed)


class _RebuiltBesideResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: NormStep, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.step = step
        ctx.save_for_backward(x, *parameters)
        ctx.set_materialize_grads(False)  # whoever does not take x over gives no gradient: zeros would cost as much
        return step.value(x, *parameters), x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x, *parameters = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        grad, beside = grads[0], grads[1] if needed[0] else None
        if grad is None:
            return None, beside, *(None for _ in parameters)
        if needed[0] and not any(needed[1:]):
            grad_x = ctx.step.input_gradient(x, grad, *parameters, beside=beside)
            if grad_x is not None:
                return None, grad_x, *(None for _ in parameters)
        found, *others = _by_autograd(ctx.step, grad, (x, *parameters), needed)
        if found is not None and beside is not None:
            found.add_(beside)
        return None, found, *others


def _by_autograd(
    step: Step, grad: Tensor, made_of: tuple[Any, ...], needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradient of each needed tensor of `made_of`, through `value`; tensors of their own."""
    pairs = zip(made_of, needed, strict=True)
    inputs: list[Any] = [None if t is None else t.detach().requires_grad_(needs) for t, needs in pairs]
    with passing_graph():
        y = step.value(*inputs)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, grad))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in inputs)

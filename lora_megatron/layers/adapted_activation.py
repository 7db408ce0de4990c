# SPDX-License-Identifier: Apache-2.0
"""What stands between the two products of a frozen MLP: fc1's adapters, the activation, and what fc2's read of it.

    forward     z' = z + s u B^T       y = act(z' + c)            u2 = drop(y) A^T
    backward    dy' = dy + drop(du2 A)  dz = dy' act'(z' + c)     du = s dz B,  dB = s dz^T u,  dA = du2^T drop(y)

z [m, f/t or 2 f/t] is fc1's product, dy [m, f/t] that of fc2's backward pass. On a GPU with Triton, at ranks up to 16,
each line is one pass over them (but for what drops out of fc2's, and for u2 where fc1 has no adapters, whose y may come
with its FP8 codes), after which z is still what it was and makes y again wherever that is read. Elsewhere one operation
follows the other: fc1's update is written over z, and du2 A is added to dy where it lies.

Of FP8 weights the next product reads codes. Without fc1's update in between they come out of the pass that computes
them; with it, of a second one. (Largest magnitudes out of the first would spare that one a reading from the cache; at
GPT-3's width both together are slower by 0.02 ms forward and 0.05 ms backward, or no faster, with four kinds of tiles.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_megatron.layers.activation import Activation
from lora_megatron.layers.dropout import Dropout
from lora_megatron.layers.low_rank import Update
from lora_megatron.layers.low_rank_input import add_input_gradient, factor_gradients
from lora_megatron.layers.main_grad import already_added, main_grads_of
from lora_megatron.layers.storage.fp8 import Fp8Products, quantise_tokens
from lora_megatron.layers.storage.quantised_activation import activated, activation_gradient
from lora_megatron.layers.storage.stored import stored_of

try:
    from lora_megatron.layers import mlp_adapters as kernels
except ImportError:  # no Triton: one operation after the other
    kernels = None  # type: ignore[assignment]  # mypy takes the name for a module; `_in_one_pass` asks for None

FEWEST_TOKENS = 256
"""Below that, as in decoding, u2 is a product of its own: the pass that sums it up walks along the columns, and would
have too few programs for a GPU. Chosen by their number, not measured."""
Rows = tuple[Tensor, ...]
"""What a product reads: a matrix, or its FP8 codes and scales."""


class Gradients(NamedTuple):
    """rows: of dz, for the product of fc1's backward pass; the rest is for autograd, None where nothing is adapted."""

    rows: Rows
    du: Tensor | None
    dbs: tuple[Tensor, ...]
    da: Tensor | None


@dataclass(frozen=True)
class AdaptedActivation:
    """Of one MLP and one microbatch.

    Args:
        fc1, fc2: frozen weights, or the handles of stored ones: they say whether the products want FP8 codes.
        bias: fc1's.
        update: fc1's adapters, with u of all tokens; None without any.
        a: A of fc2's adapter [r, f/t], if there is one, and its dropout.
        aside: u2 and du are for an exchange's copies (`layers.aside`).
    """

    activation: Activation
    fc1: Tensor
    fc2: Tensor
    bias: Tensor | None
    update: Update | None
    a: Tensor | None
    dropout: Dropout | None
    aside: bool = False

    def kept(self, z: Tensor) -> Tensor:
        """What the other methods take for z, from the product, which it may be written over."""
        if self.update is not None and not self._in_one_pass(z):
            self.update.add_to(z)
        return z

    def forward(self, z: Tensor, leading: tuple[int, ...]) -> tuple[Rows, Tensor | None]:
        """What fc2's product reads, and u2 [*leading, r] if fc2 is adapted."""
        rows, y, u2 = self._activated(z)
        if u2 is not None:
            return rows, u2.view(*leading, u2.shape[-1])
        return rows, None if self.a is None or y is None else self._dropped(y, leading) @ self.a.t()

    def backward(self, z: Tensor, dy: Tensor, du2: Tensor | None, leading: tuple[int, ...]) -> Gradients:
        """dy may be written over."""
        if self.a is not None and (self.dropout is not None or not self._in_one_pass(z)):
            assert du2 is not None
            dy = add_input_gradient(dy.view(*leading, dy.shape[-1]), du2, (self.a,), self.dropout).view(dy.shape)
        if self._in_one_pass(z):
            return self._backward_in_one_pass(z, dy, du2, leading)
        du, da = None, None
        dbs: tuple[Tensor, ...] = ()
        rows, dz, y = self._gradient(z, dy)
        del dy
        if self.update is not None and dz is not None:
            du, dbs = self.update.gradients(dz)
        del dz
        if self.a is not None and du2 is not None:
            da = self.factor_gradient(z, du2, leading, y)
        return Gradients(rows, du, dbs, da)

    def factor_gradient(self, z: Tensor, du2: Tensor, leading: tuple[int, ...], y: Tensor | None = None) -> Tensor:
        """What autograd is handed for A; y where it is known."""
        assert self.a is not None
        d = self._dropped(self._value(z) if y is None else y, leading)
        (da,) = factor_gradients((self.a,), du2, d)
        return da

    def _in_one_pass(self, z: Tensor) -> bool:
        """As `low_rank.Update` decides, and where the pass has an adapter to do: fc2's it cannot drop out."""
        if kernels is None or not z.is_cuda or z.dtype == torch.float64 or not z.shape[0]:
            return False
        adapted = self.update is not None or (self.a is not None and self.dropout is None)
        return adapted and kernels.can_take(self.update, self.a)

    def _activated(self, z: Tensor) -> tuple[Rows, Tensor | None, Tensor | None]:
        """What fc2's product reads; y, where its adapter reads it; and u2 [m, r], where it comes with y."""
        stored, act = stored_of(self.fc2), self.activation
        if not isinstance(stored, Fp8Products):
            y, u2 = self._projected(z)
            return (y,), y, u2
        factor, group = stored.forward_factor(), stored.forward_group
        if self.update is None or not self._in_one_pass(z):
            return *activated(act, z, self.bias, factor=factor, group=group, keep=self.a is not None), None
        y, u2 = self._projected(z)
        return quantise_tokens(y, factor=factor, group=group), y, u2

    def _projected(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """y, and u2 [m, r] where one pass makes both."""
        if self.update is None or self.a is None or self.dropout is not None or not self._in_one_pass(z):
            return self._value(z), None
        if z.shape[0] < FEWEST_TOKENS:
            return self._value(z), None
        act = self.activation
        problem = (z, self.bias, self.update, self.a, act.name)
        return kernels.activate_and_project(*problem, gated=act.gated, aside=self.aside)

    def _value(self, z: Tensor) -> Tensor:
        if self.update is None or not self._in_one_pass(z):
            return self.activation.value(z, self.bias)
        return kernels.activate(z, self.bias, self.update, self.activation.name, gated=self.activation.gated)

    def _gradient(self, z: Tensor, dy: Tensor) -> tuple[Rows, Tensor | None, Tensor | None]:
        """What the product of fc1's backward pass reads; dz and y, where adapters read them and they are at hand."""
        stored = stored_of(self.fc1)
        if not isinstance(stored, Fp8Products):
            dz = self.activation.gradient(z, self.bias, dy)
            return (dz,), dz, None
        factor, group = stored.backward_factor(), stored.backward_group
        keep, keep_y = self.update is not None, self.a is not None
        return activation_gradient(
            self.activation, z, self.bias, dy, factor=factor, group=group, keep=keep, keep_y=keep_y
        )

    def _backward_in_one_pass(self, z: Tensor, dy: Tensor, du2: Tensor | None, leading: tuple[int, ...]) -> Gradients:
        stored = stored_of(self.fc1)
        fp8 = stored if isinstance(stored, Fp8Products) else None
        # With dropout dy has its part of fc2's adapter already, and dA wants y behind the mask.
        a, back = (self.a, du2) if self.dropout is None else (None, None)
        bs = () if self.update is None else self.update.bs
        factors = (*bs, *(() if a is None else (a,)))
        mains = main_grads_of(factors)
        problem = (z, self.bias, self.update, a, back, dy, self.activation.name)
        dz, du, found = kernels.gradients(*problem, gated=self.activation.gated, mains=mains, aside=self.aside)
        handed = found if mains is None else already_added(factors)
        rows: Rows = (dz,)
        if fp8 is not None:
            rows = quantise_tokens(dz, factor=fp8.backward_factor(), group=fp8.backward_group)
        da = None if a is None else handed[-1]
        if self.a is not None and self.dropout is not None and du2 is not None:
            da = self.factor_gradient(z, du2, leading)
        if self.update is not None and du is not None:
            du = du.view(self.update.u.shape)
        return Gradients(rows, du, handed[: len(bs)], da)

    def _dropped(self, y: Tensor, leading: tuple[int, ...]) -> Tensor:
        y = y.view(*leading, y.shape[-1])
        return y if self.dropout is None else self.dropout(y)

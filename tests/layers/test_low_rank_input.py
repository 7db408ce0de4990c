# SPDX-License-Identifier: Apache-2.0
"""u = x A^T with x handed on to a large product: gradients of plain algebra, x's summed in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_megatron.layers.dropout import Dropout
from lora_megatron.layers.frozen import frozen_linear
from lora_megatron.layers.low_rank_input import low_rank_input

DROPOUT = Dropout(0.5, 3, 0)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("ranks", [(3,), (2, 4)], ids=["one adapter", "two"])
def test_gradients_through_u_and_the_product_are_those_of_plain_algebra(
    ranks: tuple[int, ...], dropout: Dropout | None
) -> None:
    weight, back = random(7, 5, seed=1), random(4, 2, 7, seed=2)
    back_u = random(4, 2, sum(ranks), seed=3)
    leaves = [random(4, 2, 5, seed=4), *(random(rank, 5, seed=5 + rank) for rank in ranks)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    x, *factors = leaves
    u, handed_on = low_rank_input(x, factors, dropout)
    assert handed_on.data_ptr() == x.data_ptr()
    ours = (u * back_u).sum() + (frozen_linear(handed_on, weight) * back).sum()
    wanted = (x if dropout is None else dropout(x)) @ torch.cat(factors).t()
    torch.testing.assert_close(u, wanted, rtol=1e-12, atol=1e-12)
    theirs = (wanted * back_u).sum() + (x @ weight.t() * back).sum()
    for got, want in zip(*(torch.autograd.grad(loss, leaves) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("read", ["u", "handed on"])
def test_one_of_the_two_may_be_left_unread(read: str) -> None:
    x, a, weight = random(4, 2, 5, seed=1).requires_grad_(), random(3, 5, seed=2), random(7, 5, seed=3)
    u, handed_on = low_rank_input(x, [a.requires_grad_()], None)
    (u if read == "u" else frozen_linear(handed_on, weight)).sum().backward()
    want = (a if read == "u" else weight).detach().sum(0).expand(4, 2, 5)
    torch.testing.assert_close(x.grad, want, rtol=1e-12, atol=1e-12)
    assert (a.grad is None) == (read != "u")


def test_the_gradient_is_summed_where_the_product_left_it() -> None:
    """No second tensor as large as x, and no pass that sums two."""
    places: list[int] = []
    x = random(4, 2, 5, seed=1).requires_grad_() * 1
    u, handed_on = low_rank_input(x, [random(3, 5, seed=2).requires_grad_()], None)
    y = frozen_linear(handed_on, random(7, 5, seed=3))
    for tensor in (handed_on, x):
        tensor.register_hook(lambda grad: places.append(grad.data_ptr()))
    (u.sum() + y.sum()).backward()
    assert len(places) == 2
    assert places[0] == places[1]


def test_an_input_that_needs_no_gradient_is_handed_on_so() -> None:
    """Else the product would compute a gradient that nothing reads."""
    x = random(4, 2, 5, seed=1)
    u, handed_on = low_rank_input(x, [random(3, 5, seed=2).requires_grad_()], None)
    assert u.requires_grad
    assert not handed_on.requires_grad

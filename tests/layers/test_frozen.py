# SPDX-License-Identifier: Apache-2.0
"""The linear layer on a frozen weight against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lora_megatron.layers.frozen import frozen_linear


@pytest.mark.parametrize("view", ["plain", "transposed", "expanded"])
def test_frozen_linear_equals_linear_and_keeps_no_activation(view: str) -> None:
    generator = torch.Generator().manual_seed(8)
    weight = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64).requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        ours = frozen_linear(x, weight)
    theirs = functional.linear(x2, weight)
    torch.testing.assert_close(ours, theirs)
    assert kept == [(7, 5)], "the weight is kept for backward, the input is not"
    gradients = {
        "plain": torch.randn(3, 4, 7, generator=generator, dtype=torch.float64),
        "transposed": torch.randn(4, 3, 7, generator=generator, dtype=torch.float64).transpose(0, 1),
        "expanded": torch.randn(1, 1, 7, generator=generator, dtype=torch.float64).expand(3, 4, 7),
    }
    ours.backward(gradients[view])
    theirs.backward(gradients[view])
    torch.testing.assert_close(x.grad, x2.grad)
    with pytest.raises(AssertionError):
        frozen_linear(x, nn.Parameter(weight))

# SPDX-License-Identifier: Apache-2.0
"""A norm that hands its input on as the residual gives the gradients that autograd sums, and leaves nothing behind."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.fusions import fused_bias_dropout
from megatron.core.fusions.fused_bias_dropout import bias_dropout_add_unfused
from torch import Tensor, nn
from torch.nn import functional

from lora_megatron.layers.low_rank import Update
from lora_megatron.layers.norm import LayerNorm, RMSNorm
from lora_megatron.layers.qkv import whole
from lora_megatron.layers.rebuilt import taken_over
from lora_megatron.layers.residual import BiasAndUpdate, get_residual_add

WIDTH = 12
NORMS = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}
every_norm = pytest.mark.parametrize("name", NORMS)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norm_of(name: str, *trained: str, beside_residual: bool = True) -> LayerNorm:
    config: Any = SimpleNamespace(params_dtype=torch.float32, use_cpu_initialization=True, sequence_parallel=False)
    module = NORMS[name](config, WIDTH, beside_residual=beside_residual)
    for index, (which, parameter) in enumerate(module.named_parameters()):
        parameter.requires_grad_(False).copy_(1 + 0.3 * random(WIDTH, seed=index))
        parameter.requires_grad_(which in trained)
    return module


def layer(module: nn.Module, h: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """h + branch(norm(h)), as megatron-core's layer computes it."""
    y = module(h)
    return get_residual_add(True, False)((y @ random(WIDTH, WIDTH, seed=7), bias), h, 0.0)


def node_of(module: nn.Module, h: Tensor) -> tuple[Any, list[tuple[Tensor | None, ...]]]:
    """The norm's output, and a list of what its node gets for gradients."""
    y, got = module(h), list[tuple[Tensor | None, ...]]()
    y.grad_fn.register_prehook(lambda grads: got.append(grads))
    return y, got


@every_norm
@pytest.mark.parametrize("trained", [(), ("weight",), ("bias",), ("weight", "bias")], ids=str)
def test_values_and_gradients_are_those_of_plain_algebra(name: str, trained: tuple[str, ...]) -> None:
    module = norm_of(name, *trained)
    leaf, back = (random(5, 2, WIDTH, seed=seed) for seed in (3, 4))
    leaves = [leaf.requires_grad_(), *(p for p in module.parameters() if p.requires_grad)]
    got = layer(module, leaf * 1)
    twins = {key: p.detach().double().requires_grad_(p.requires_grad) for key, p in module.named_parameters()}
    h = leaf.detach().double().requires_grad_()
    if name == "RMSNorm":
        y = functional.rms_norm(h, (WIDTH,), twins["weight"], module.eps)
    else:
        y = functional.layer_norm(h, (WIDTH,), twins["weight"], twins["bias"], module.eps)
    want = h + y @ random(WIDTH, WIDTH, seed=7).double()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)
    found = torch.autograd.grad(got, leaves, back)
    wanted = torch.autograd.grad(want, [h, *(t for t in twins.values() if t.requires_grad)], back.double())
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm() / other.norm()) < 2e-6


@every_norm
@pytest.mark.parametrize("trained", [(), ("weight",)], ids=str)
def test_gradients_have_the_bits_that_autograd_sums(name: str, trained: tuple[str, ...]) -> None:
    """A sum of two has no order."""
    leaf, back, found = random(5, 2, WIDTH, seed=3).requires_grad_(), random(5, 2, WIDTH, seed=4), []
    for beside_residual in (True, False):
        module = norm_of(name, *trained, beside_residual=beside_residual)
        leaves = [leaf, *(p for p in module.parameters() if p.requires_grad)]
        h = layer(module, leaf * 1)
        found.append((h, *torch.autograd.grad(h, leaves, back)))
    assert len(found[0]) == 2 + len(trained)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


@pytest.mark.parametrize("way", ["bias", "update", "update, dropout", "update, compiled"])
def test_every_way_of_adding_takes_it_over(way: str) -> None:
    leaf, factor, found = random(5, 2, WIDTH, seed=3).requires_grad_(), nn.Parameter(random(WIDTH, 3, seed=8)), []
    for beside_residual in (True, False):
        module, h = norm_of("LayerNorm", beside_residual=beside_residual), leaf * 1
        y, got = node_of(module, h)
        update = Update(whole("o", WIDTH), (1.7,), y @ random(WIDTH, 3, seed=9), (factor,))
        left = random(WIDTH, seed=6) if way == "bias" else BiasAndUpdate.of(random(WIDTH, seed=6), update)
        torch.manual_seed(1)
        with mock.patch.object(fused_bias_dropout, "bias_dropout_add_fused_train", bias_dropout_add_unfused(True)):
            add = get_residual_add(True, way.endswith("compiled"))
        out = add((y * 2, left), h, 0.4 if way.endswith("dropout") else 0.0)
        leaves = [leaf] if way == "bias" else [leaf, factor]
        assert not vars(h)
        found.append((out, *torch.autograd.grad(out, leaves, random(5, 2, WIDTH, seed=4))))
        assert [len(grads) for grads in got] == [1 + beside_residual]
        assert None not in got[0]
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@every_norm
def test_the_norm_gets_both_gradients_and_its_input_one(name: str) -> None:
    """So autograd adds nothing."""
    h, ones = random(5, 2, WIDTH, seed=3).requires_grad_() * 1, list[Any]()
    y, got = node_of(norm_of(name), h)
    h.grad_fn.register_prehook(lambda grads: ones.append(grads))
    out = get_residual_add(True, False)((2 * y, None), h, 0.0)
    assert out.grad_fn is not None
    after = [node for node, _ in out.grad_fn.next_functions]
    assert y.grad_fn in after, "the addition comes right behind the norm"
    assert h.grad_fn not in after
    out.sum().backward()
    ((of_y, of_residual),), ((of_h,),) = got, ones
    assert torch.equal(of_y, torch.full_like(h, 2.0))
    assert torch.equal(of_residual, torch.ones_like(h))
    assert of_h.shape == h.shape


@every_norm
@pytest.mark.parametrize("read", ["y", "residual"])
def test_one_of_the_two_may_be_left_unread(name: str, read: str) -> None:
    leaf = random(5, 2, WIDTH, seed=3).requires_grad_()
    found = []
    for beside_residual in (True, False):
        h = leaf * 1
        y = norm_of(name, "weight", beside_residual=beside_residual)(h)
        out = y if read == "y" else taken_over(h) * 1
        found.append(torch.autograd.grad(out, leaf, random(5, 2, WIDTH, seed=4))[0])
    assert torch.equal(*found)


def test_a_trained_norm_alone_can_be_asked_for() -> None:
    """Of the gradients of what is not asked for none is computed."""
    module, leaf = norm_of("LayerNorm", "weight", "bias"), random(5, 2, WIDTH, seed=3).requires_grad_()
    (of_bias,) = torch.autograd.grad(layer(module, leaf * 1).sum(), [module.bias])
    assert float(of_bias.abs().sum()) > 0


def test_the_residual_is_taken_over_once_and_by_itself() -> None:
    h = random(5, 2, WIDTH, seed=3).requires_grad_() * 1
    y = norm_of("LayerNorm")(h)
    assert taken_over(y) is y, "another tensor than the norm read"
    assert taken_over(h.detach()).grad_fn is None
    handed_on = taken_over(h)
    assert handed_on.grad_fn is y.grad_fn
    assert handed_on.data_ptr() == h.data_ptr()
    assert taken_over(h) is h
    assert not vars(h)


def test_it_is_gone_with_the_norms_output() -> None:
    h = random(5, 2, WIDTH, seed=3).requires_grad_() * 1
    norm_of("LayerNorm")(h)
    assert taken_over(h) is h


@pytest.mark.parametrize("why", ["no gradients are recorded", "the input needs none", "not asked for"])
def test_nothing_is_handed_on_where(why: str) -> None:
    module = norm_of("RMSNorm", "weight", beside_residual=why != "not asked for")
    h = random(5, 2, WIDTH, seed=3).requires_grad_(why != "the input needs none")
    with torch.set_grad_enabled(why != "no gradients are recorded"):
        y = module(h)
        assert not {"handed_on", "residual"} & {*vars(h), *vars(y)}
        assert taken_over(h) is h
        assert torch.equal(layer(module, h), h + y @ random(WIDTH, WIDTH, seed=7))


@pytest.mark.parametrize("end", ["backward", "graph dropped", "never taken over", "an error in the branch"])
@pytest.mark.parametrize("of_a_leaf", [False, True], ids=["of a graph", "a leaf"])
def test_what_was_read_dies_with_the_graph(of_a_leaf: bool, end: str) -> None:
    """At once, by counts of references: Python's collector sees no cycle that goes through autograd."""

    def branch(y: Tensor) -> Tensor:
        raise RuntimeError

    def run() -> weakref.ref[Tensor]:
        h = random(5, 2, WIDTH, seed=3).requires_grad_()
        h, module = h if of_a_leaf else h * 1, norm_of("LayerNorm")
        if end == "an error in the branch":
            with pytest.raises(RuntimeError):
                branch(module(h))
        elif end == "never taken over":
            (module(h) + h).sum().backward()
        else:
            out = layer(module, h)
            assert not vars(h)
            if end == "backward":
                out.sum().backward()
        return weakref.ref(h)

    assert run()() is None


@every_norm
def test_no_more_is_kept_than_without(name: str) -> None:
    kept = []
    for beside_residual in (True, False):
        saved: list[Tensor] = []
        h = random(5, 2, WIDTH, seed=3).requires_grad_() * 1
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            layer(norm_of(name, beside_residual=beside_residual), h)
        kept.append([(t.shape, t.data_ptr() == h.data_ptr()) for t in saved])
    assert kept[0] == kept[1]

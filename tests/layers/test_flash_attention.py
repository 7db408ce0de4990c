# SPDX-License-Identifier: Apache-2.0
"""`train.attention = fa4`: what FlashAttention 4 is asked for and what is left to torch, with a stand-in on any
machine, and its kernels against attention in fp32 on a GPU that has them.

    python -m pytest tests/layers/test_flash_attention.py -m gpu -s
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lora_megatron.layers.attention import SdpaAttention
from lora_megatron.layers.cache import LayerCache, Span
from lora_megatron.layers.qkv import qkv_parts

HAS_KERNELS = (
    torch.cuda.is_available()
    and torch.cuda.get_device_capability() >= (9, 0)
    and importlib.util.find_spec("flash_attn") is not None
    and importlib.util.find_spec("flash_attn.cute") is not None
)
LENGTH, DIM = 6, 8


def attention_with(*, window: int = 0, kernels: str = "fa4", scale: float | None = None) -> SdpaAttention:
    sizes = (window - 1, 0) if window else None
    config = SimpleNamespace(window_size=sizes, window_attn_skip_freq=[1])
    return SdpaAttention(config, 1, softmax_scale=scale, kernels=kernels)  # type: ignore[arg-type]  # it reads two fields alone


def fused_qkv(
    length: int, batch: int, heads: int, groups: int, dim: int, **how: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A fused output [s, b, groups * (heads of a group + 2) * d], and q, k and v as an adapted layer cuts them out."""
    generator = torch.Generator(how.get("device", "cpu")).manual_seed(6)
    fused = torch.randn(length, batch, (heads + 2 * groups) * dim, generator=generator, **how).requires_grad_()
    q, k, v = (part.of(fused) for part in qkv_parts(heads, groups, dim))
    return fused, (q.reshape(length, batch, heads, dim), k, v)


class Stand:
    """In the place of flash_attn_func: attention written out, and how it was asked for it."""

    def __init__(self) -> None:
        self.calls = list[dict[str, Any]]()
        self.out: Tensor | None = None
        self.as_tuple = True

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        deterministic: bool = False,
    ) -> Any:
        """q [b, s, heads, d], k and v [b, s, groups, d] -> ([b, s, heads, d], log-sum-exp [b, heads, s])."""
        self.calls.append({"q": q, "k": k, "v": v, "scale": softmax_scale, "deterministic": deterministic})
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
        scores = torch.einsum("bshd,bthd->bhst", q, k) * (
            q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
        )
        if causal:
            later = torch.ones(scores.shape[-2:]).triu(1).bool()
            scores = scores.masked_fill(later, -torch.inf)
        self.out = torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v).contiguous()
        return (self.out, scores.logsumexp(-1)) if self.as_tuple else self.out


@contextlib.contextmanager
def put_in_place(function: Any) -> Iterator[None]:
    """As flash-attn-4's. What else is imported meanwhile stays, which `patch.dict` would take away again."""
    names = "flash_attn", "flash_attn.cute", "flash_attn.cute.interface"
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update({name: ModuleType(name) for name in names})
    sys.modules[names[-1]].flash_attn_func = function  # type: ignore[attr-defined]  # of a module made here
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


@pytest.fixture
def stand() -> Iterator[Stand]:
    """With the package's stand-in, and a CPU's tensors taken for a GPU's."""
    stand = Stand()
    with put_in_place(stand), mock.patch.object(Tensor, "is_cuda", True, create=True):
        yield stand


def outcome(attention: SdpaAttention, batch: int, heads: int, groups: int) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of the fused tensor that q, k and v are of, which has all three of theirs."""
    fused, qkv = fused_qkv(LENGTH, batch, heads, groups, DIM, dtype=torch.float64)
    out = attention(*qkv)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    (out * weights).sum().backward()
    assert fused.grad is not None
    return out.detach(), fused.grad


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_it_gives_what_torch_gives(stand: Stand, batch: int, heads: int, groups: int, scale: float | None) -> None:
    got = outcome(attention_with(scale=scale), batch, heads, groups)
    assert len(stand.calls) == 1
    want = outcome(attention_with(scale=scale, kernels="torch"), batch, heads, groups)
    assert len(stand.calls) == 1
    assert got[0].shape == (LENGTH, batch, heads * DIM)
    torch.testing.assert_close(got, want)
    stand.as_tuple = False
    torch.testing.assert_close(outcome(attention_with(scale=scale), batch, heads, groups), want)


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_nothing_is_copied_but_the_output_of_several_samples(stand: Stand, batch: int, groups: int) -> None:
    """Keys and values are not repeated for the heads of a group either."""
    _, qkv = fused_qkv(LENGTH, batch, 4, groups, DIM)
    out = attention_with(scale=0.3)(*qkv)
    (call,) = stand.calls
    for name, given in zip("qkv", qkv, strict=True):
        assert call[name].shape == (batch, LENGTH, 4 if name == "q" else groups, DIM)
        assert call[name].data_ptr() == given.data_ptr()
        assert call[name].stride() == given.transpose(0, 1).stride()
        assert call[name].stride(-1) == 1
    assert (call["scale"], call["deterministic"]) == (0.3, False)
    assert out.is_contiguous()
    assert stand.out is not None
    assert (out.data_ptr() == stand.out.data_ptr()) == (batch == 1), "`planning.activations` counts on it"


@pytest.mark.parametrize("window", [LENGTH, LENGTH + 3])
def test_a_window_that_hides_nothing_is_taken(stand: Stand, window: int) -> None:
    with torch.no_grad():  # held-out rows too
        got = attention_with(window=window)(*fused_qkv(LENGTH, 2, 4, 2, DIM)[1])
    assert len(stand.calls) == 1
    torch.testing.assert_close(got, attention_with(kernels="torch")(*fused_qkv(LENGTH, 2, 4, 2, DIM)[1]).detach())


def test_determinism_is_asked_for_where_torch_is_asked_for_it(stand: Stand) -> None:
    _, qkv = fused_qkv(LENGTH, 1, 2, 2, DIM)
    torch.use_deterministic_algorithms(True)
    try:
        attention_with()(*qkv)
        assert [call["deterministic"] for call in stand.calls] == [True]
    finally:
        torch.use_deterministic_algorithms(False)


def left_to_torch() -> dict[str, Any]:
    """name -> (attention, arguments)."""
    q, k, v = (x.detach() for x in fused_qkv(LENGTH, 2, 4, 2, DIM)[1])
    later = torch.ones(LENGTH, LENGTH).triu(1).bool().expand(2, 1, -1, -1)
    decoding = attention_with()
    decoding.cache = LayerCache()
    decoding.cache.span = Span([0, 0], LENGTH, torch.device("cpu"))
    return {
        "a mask": (attention_with(), (q, k, v, later)),
        "a short window": (attention_with(window=LENGTH - 1), (q, k, v)),
        "a cache": (decoding, (q, k, v)),
        "a single position": (attention_with(), (q[-1:], k, v)),
        "one token": (attention_with(), (q[:1], k[:1], v[:1])),
        "torch": (attention_with(kernels="torch"), (q, k, v)),
    }


@pytest.mark.parametrize("what", left_to_torch())
def test_what_is_left_to_torch(stand: Stand, what: str) -> None:
    attention, arguments = left_to_torch()[what]
    got = attention(*arguments)
    assert stand.calls == []
    attention.kernels = "torch"
    if attention.cache is not None:
        attention.cache.keys = attention.cache.values = None
    torch.testing.assert_close(got, attention(*arguments), rtol=0, atol=0)


def test_a_cpu_s_tensors_are_left_to_torch() -> None:
    stand = Stand()
    with put_in_place(stand):
        attention_with()(*fused_qkv(LENGTH, 1, 2, 2, DIM)[1])
    assert stand.calls == []


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_KERNELS, reason="needs a GPU of compute capability 9.0 or newer, and flash-attn-4")
@pytest.mark.parametrize(
    ("length", "batch", "heads", "groups", "dim"),
    [
        pytest.param(2048, 1, 24, 24, 128, id="GPT-3, TP=4"),
        pytest.param(1000, 2, 16, 2, 128, id="grouped, two samples, an odd length"),
        pytest.param(512, 4, 12, 12, 64, id="GPT-2"),
    ],
)
def test_the_kernels_on_a_gpu(length: int, batch: int, heads: int, groups: int, dim: int) -> None:
    """Output and the gradients of q, k and v against fp32's, from the same bf16 numbers: by norms off by no more than
    1e-2, and no more than half as much again as torch's kernels in bf16 are."""

    def run(kernels: str, dtype: torch.dtype) -> dict[str, Tensor]:
        _, qkv = fused_qkv(length, batch, heads, groups, dim, device="cuda", dtype=torch.bfloat16)
        if dtype != torch.bfloat16:
            qkv = tuple(x.detach().to(dtype).requires_grad_() for x in qkv)
        out = attention_with(kernels=kernels)(*qkv)
        generator = torch.Generator("cuda").manual_seed(9)
        back = torch.randn(out.shape, generator=generator, device="cuda").bfloat16().to(dtype)
        grads = torch.autograd.grad(out, qkv, back)
        return {"out": out.detach(), **dict(zip("qkv", grads, strict=True))}

    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        exact = run("torch", torch.float32)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    usual, flash = run("torch", torch.bfloat16), run("fa4", torch.bfloat16)
    for name, want in exact.items():
        off, torch_off = (float((got[name].float() - want).norm() / want.norm()) for got in (flash, usual))
        print(f"{name}: off by {off:.2e}, torch's by {torch_off:.2e}")
        assert off < 1e-2, name
        assert off < 1.5 * torch_off, name

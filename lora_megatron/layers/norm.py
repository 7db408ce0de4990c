# SPDX-License-Identifier: Apache-2.0
"""LayerNorm and RMSNorm that work on sequence shards and keep their input alone.

megatron-core's fallback to torch's norms refuses sequence parallelism. Here the parameters carry the declaration that
their gradients are partial sums over sequence shards, and megatron-core sums them.

What is kept for the backward pass is x, in its own precision: the output is computed again for an adapter that reads it
(`layers.rebuilt`). Where a kernel norms, two fp32 numbers of each row (a token, or of q and k a head of one) are kept
beside x, its mean and 1 / sqrt(var + eps), or of RMSNorm the latter alone. With them another kernel norms what an
adapter reads while it reads it; elsewhere they too are computed again. The plan leaves them out: at most some 0.3% of a
layer.

Where a product in FP8 reads the output, or the input's gradient with that of the residual in it, the kernel leaves it
the codes (`ReadInFp8`, `storage.left_codes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from megatron.core.fusions.fused_layer_norm import HAVE_FUSED_LAYER_NORM, FusedLayerNorm
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional

from lora_megatron.layers.rebuilt import NormStep, Step, rebuilt, rebuilt_beside_residual
from lora_megatron.layers.sharding import REPLICATED, declare
from lora_megatron.layers.storage.left_codes import Quantised, leave

try:
    from lora_megatron.layers import norm_kernels as kernels
    from lora_megatron.layers.storage.kernels import room_for_codes
except ImportError:  # no Triton: torch's own
    kernels = None  # type: ignore[assignment]  # mypy takes the name for a module; None is what is asked for below


class ReadInFp8(NamedTuple):
    """What is read by a product in FP8 whose tokens have a scale and no other factor, and by nothing in between."""

    output: bool = False
    gradient: bool = False
    """dL/dx, once that of the residual is in it: by the backward product of the row layer before the residual."""


NEITHER = ReadInFp8()


@dataclass(frozen=True)
class _LayerNormStep:
    """(x - mean) / sqrt(var + eps) * weight + bias; parameters: weight, bias, statistics.

    statistics: None, or room for those of each row, which a kernel fills, each time with the same.
    """

    eps: float
    in_fp8: ReadInFp8 = NEITHER

    def value(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        weight, bias, statistics = parameters
        assert weight is not None
        if statistics is not None and not torch.is_grad_enabled():
            return _value(x, weight, bias, self.eps, statistics, in_fp8=self.in_fp8.output)
        return functional.layer_norm(x, (x.shape[-1],), weight, bias, self.eps)

    def input_gradient(
        self, x: Tensor, grad: Tensor, *parameters: Tensor | None, beside: Tensor | None = None
    ) -> Tensor | None:
        numbers = parameters[0], parameters[-1]
        return _input_gradient(x, grad, *numbers, beside, centred=True, in_fp8=self.in_fp8.gradient)


@dataclass(frozen=True)
class _RMSNormStep:
    """x / sqrt(mean(x^2) + eps) * weight; the mean is taken in fp32, as transformers' Llama does.

    parameters: weight, and statistics as of `_LayerNormStep`.
    """

    eps: float
    in_fp8: ReadInFp8 = NEITHER

    def value(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        weight, statistics = parameters
        assert weight is not None
        if statistics is not None and not torch.is_grad_enabled():
            return _value(x, weight, None, self.eps, statistics, in_fp8=self.in_fp8.output)
        return functional.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype) * weight

    def input_gradient(
        self, x: Tensor, grad: Tensor, *parameters: Tensor | None, beside: Tensor | None = None
    ) -> Tensor | None:
        numbers = parameters[0], parameters[-1]
        return _input_gradient(x, grad, *numbers, beside, centred=False, in_fp8=self.in_fp8.gradient)


def _value(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, statistics: Tensor, *, in_fp8: bool) -> Tensor:
    room = room_for_codes(x) if in_fp8 else None
    y: Tensor = kernels.norm(x.contiguous(), weight, bias, eps, statistics, room)
    if room is not None:
        leave(y, Quantised(*room))
    return y


def _input_gradient(
    x: Tensor,
    grad: Tensor,
    weight: Tensor | None,
    statistics: Tensor | None,
    beside: Tensor | None,
    *,
    centred: bool,
    in_fp8: bool,
) -> Tensor | None:
    assert weight is not None
    if statistics is None:
        return None
    beside = None if beside is None else beside.contiguous()
    # Without the residual's gradient, autograd adds it to what is returned here: that is not what is read.
    room = room_for_codes(x) if in_fp8 and beside is not None else None
    dx: Tensor = kernels.norm_gradient(
        x.contiguous(), grad.contiguous(), weight, statistics, centred=centred, beside=beside, quantised=room
    )
    if room is not None:
        leave(dx, Quantised(*room))
    return dx


def without_codes(step: Step) -> Step:
    """The same for a reader that multiplies nothing in FP8."""
    return replace(step, in_fp8=NEITHER) if isinstance(step, (_LayerNormStep, _RMSNormStep)) else step


def _by_kernel(x: Tensor) -> bool:
    return kernels is not None and x.is_cuda and x.shape[-1] <= kernels.WIDEST


def _room_for_statistics(x: Tensor, *, centred: bool) -> Tensor | None:
    """Where a kernel norms x."""
    return kernels.room_for_statistics(x, centred=centred) if _by_kernel(x) else None


class NormedRows(NamedTuple):
    """What a norm's output is made of tile by tile, by whoever reads it: h [..., width] contiguous, its input; weight
    and, of LayerNorm, bias [width]; statistics as of `norm_kernels.room_for_statistics`, filled."""

    h: Tensor
    weight: Tensor
    bias: Tensor | None
    statistics: Tensor


def normed_rows(step: Step, ingredients: Sequence[Tensor | None]) -> NormedRows | None:
    """Of what was made so (`rebuilt.Recipe`), if it is what a kernel normed."""
    if not isinstance(step, (_LayerNormStep, _RMSNormStep)) or ingredients[-1] is None:
        return None
    h, weight, *bias = ingredients[:-1]
    assert h is not None
    assert weight is not None
    return NormedRows(h.contiguous(), weight, bias[0] if bias else None, ingredients[-1])


class LayerNorm(nn.Module):
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last dimension; x [s or s/t, b, hidden_size].

    Args:
        beside_residual: x is the residual too, which `layers.residual` adds: its gradient comes through here.
        in_fp8: for what a kernel leaves its codes.
        The rest is megatron-core's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        beside_residual: bool = False,
        in_fp8: ReadInFp8 = NEITHER,
        **megatron: Any,
    ) -> None:
        super().__init__()
        self.shape, self.eps, self.beside_residual, self.in_fp8 = (hidden_size,), eps, beside_residual, in_fp8
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        declare(self.weight, REPLICATED, sum_over_sequence_shards=config.sequence_parallel)
        self.bias = self._bias(config, device)

    def _bias(self, config: TransformerConfig, device: Any) -> nn.Parameter | None:
        bias = nn.Parameter(torch.zeros(self.shape, dtype=config.params_dtype, device=device))
        declare(bias, REPLICATED, sum_over_sequence_shards=config.sequence_parallel)
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape."""
        room = _room_for_statistics(x, centred=True)
        return self._made(_LayerNormStep(self.eps, self.in_fp8), x, self.weight, self.bias, room)

    def _made(self, step: NormStep, x: Tensor, *parameters: Tensor | None) -> Tensor:
        return (rebuilt_beside_residual if self.beside_residual else rebuilt)(step, x, *parameters)


class RMSNorm(LayerNorm):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def _bias(self, config: TransformerConfig, device: Any) -> None:
        return None

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape."""
        return self._made(_RMSNormStep(self.eps, self.in_fp8), x, self.weight, _room_for_statistics(x, centred=False))


class ApexLayerNorm(FusedLayerNorm):
    """apex's fused LayerNorm through megatron-core, with the sharding declaration."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **megatron: Any) -> None:
        super().__init__(config, hidden_size, eps, **megatron)
        for parameter in self.parameters():
            declare(parameter, REPLICATED, sum_over_sequence_shards=config.sequence_parallel)


def norm_class(normalization: str) -> type[nn.Module]:
    """The norm for `LayerNorm` or `RMSNorm`: apex's fused kernel where importable on a GPU, torch's elsewhere."""
    if normalization == "LayerNorm" and HAVE_FUSED_LAYER_NORM and torch.cuda.is_available():
        return ApexLayerNorm
    return {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}[normalization]


def norm_spec(normalization: str, *, beside_residual: bool, in_fp8: ReadInFp8) -> ModuleSpec:
    """The same with what `LayerNorm` takes; apex's function knows no second gradient, and leaves no codes."""
    norm = norm_class(normalization)
    params = {"beside_residual": beside_residual, "in_fp8": in_fp8} if issubclass(norm, LayerNorm) else {}
    return ModuleSpec(norm, params=params)

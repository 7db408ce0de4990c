# SPDX-License-Identifier: Apache-2.0
"""The architecture of a decoder-only transformer, in numbers: what a checkpoint must agree with."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lora_megatron.errors import CheckpointError, ConfigError
from lora_megatron.layers.rope import attention_factor, check_scaling


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes and choices that define the function a set of weights computes."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    max_position_embeddings: int
    vocab_size: int
    normalization: str = "LayerNorm"
    norm_epsilon: float = 1e-5
    activation: str = "gelu_tanh"
    gated_mlp: bool = False
    linear_bias: bool = True
    """Of fc1 and fc2; attention's two have switches of their own."""
    qkv_bias: bool = True
    proj_bias: bool = True
    qk_norm: bool = False
    parallel_residual: bool = False
    position: str = "learned"
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    sliding_window: int = 0
    full_attention_layers: int = 0
    tied_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_query_groups:
            raise ConfigError(
                f"model.num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"model.num_query_groups = {self.num_query_groups}"
            )
        if self.position == "rope":
            self._check_rotary()

    def _check_rotary(self) -> None:
        """Fail here, in one line, rather than in the middle of building."""
        if not 2 <= self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            raise ConfigError(
                f"model.head_dim = {self.head_dim} with rotary_percent = {self.rotary_percent}: rotary positions turn "
                f"pairs, so {self.rotary_dim} dimensions must be an even number of at least 2"
            )
        if self.rotary_base <= 1:
            raise ConfigError(f"model.rotary_base = {self.rotary_base} must be above 1: frequencies fall with it")
        check_scaling(self.rope_scaling)
        if self.rotary_dim < self.head_dim and attention_factor(self.rope_scaling) != 1.0:
            raise ConfigError(
                f"model.rotary_percent = {self.rotary_percent}: with yarn the whole head must turn, set it to 1"
            )

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that turn with the position."""
        return int(self.head_dim * self.rotary_percent)

    def window(self, layer: int) -> int:
        """Tokens that a position of global layer `layer` sees, itself included; 0 is all."""
        return self.sliding_window if layer >= self.full_attention_layers else 0

    def projection(self, name: str) -> tuple[int, int]:
        """(out, in) features of the projection q, k, v, o, fc1, gate, up or fc2."""
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_query_groups * self.head_dim
        h, f = self.hidden_size, self.ffn_hidden_size
        return {
            "q": (queries, h),
            "k": (keys, h),
            "v": (keys, h),
            "o": (h, queries),
            "fc1": (f, h),
            "gate": (f, h),
            "up": (f, h),
            "fc2": (h, f),
        }[name]

    @property
    def projections(self) -> tuple[str, ...]:
        """The projections of a layer, in the order they run."""
        return ("q", "k", "v", "o", *(("gate", "up") if self.gated_mlp else ("fc1",)), "fc2")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str) -> ModelShape:
        """The inverse of `to_dict`; raises CheckpointError naming `source` for missing, extra or mistyped values."""
        names = {known.name: str(known.type) for known in fields(cls)}
        if set(values) != set(names):
            wrong = sorted(set(values) ^ set(names))
            raise CheckpointError(f"{source}: missing or unknown model fields: {', '.join(wrong)}")
        kinds = {"int": int, "str": str, "bool": bool, "float": float, "dict[str, Any]": dict}
        for name, kind in names.items():
            if type(values[name]) is not kinds[kind]:
                raise CheckpointError(f"{source}: {name} = {values[name]!r} is not of type {kind}")
        return cls(**values)

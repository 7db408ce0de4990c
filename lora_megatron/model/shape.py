# SPDX-License-Identifier: Apache-2.0
"""The architecture of a decoder-only transformer, in numbers: what a checkpoint must agree with."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from lora_megatron.errors import CheckpointError, ConfigError


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
    position: str = "learned"
    rotary_base: float = 10000.0
    tied_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_query_groups:
            raise ConfigError(
                f"model.num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"model.num_query_groups = {self.num_query_groups}"
            )

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
        names = {field.name: field.type for field in fields(cls)}
        if set(values) != set(names):
            wrong = sorted(set(values) ^ set(names))
            raise CheckpointError(f"{source}: missing or unknown model fields: {', '.join(wrong)}")
        kinds = {"int": int, "str": str, "bool": bool, "float": float}
        for name, kind in names.items():
            if type(values[name]) is not kinds[str(kind)]:
                raise CheckpointError(f"{source}: {name} = {values[name]!r} is not of type {kind}")
        return cls(**values)

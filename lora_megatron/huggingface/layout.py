# SPDX-License-Identifier: Apache-2.0
"""Which rows of which tensor of a family a parameter of ours is made of: what loading, merging and converting share."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from lora_megatron.huggingface.families import Family
from lora_megatron.layers.qkv import Part, gated_parts, qkv_parts, whole
from lora_megatron.model.names import EMBEDDING, OUTPUT, POSITIONS
from lora_megatron.model.shape import ModelShape

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(?:self_attention\.|mlp\.)?(\w+)\.(weight|bias)$")
_PROJECTIONS = {"linear_qkv": ("q", "k", "v"), "linear_proj": ("o",), "linear_fc2": ("fc2",)}


@dataclass(frozen=True)
class Piece:
    """Rows of one of a family's tensors, as a matrix [rows, columns] or vector [rows] of ours."""

    tensor: str
    """Its full name, the backbone's beginning included."""
    rows: Part
    columns: int | None = None
    """None for a vector."""
    transposed: bool = False
    """Kept [columns, rows]."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the piece as ours."""
        return (self.rows.rows,) if self.columns is None else (self.rows.rows, self.columns)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor as the family keeps it."""
        full = self.rows.groups * self.rows.stride
        if self.columns is None:
            return (full,)
        return (self.columns, full) if self.transposed else (full, self.columns)


def projections_of(module: str, shape: ModelShape) -> tuple[str, ...]:
    """The projections fused in our linear `module` (`linear_qkv` ...), none for a norm."""
    if module == "linear_fc1":
        return ("gate", "up") if shape.gated_mlp else ("fc1",)
    return _PROJECTIONS.get(module, ())


def fused_rows(module: str, shape: ModelShape, *, tensor_size: int) -> dict[str, Part]:
    """Projection -> its rows in our fused parameter on one of `tensor_size` ranks."""
    if module == "linear_qkv":
        heads, groups = shape.num_attention_heads // tensor_size, shape.num_query_groups // tensor_size
        parts: tuple[Part, ...] = qkv_parts(heads, groups, shape.head_dim)
    elif module == "linear_fc1" and shape.gated_mlp:
        parts = gated_parts(shape.ffn_hidden_size // tensor_size)
    else:
        parts = ()
    return {part.name: part for part in parts}


def module_path(family: Family, layer: int, module: str) -> str:
    """The family's module of a projection or norm of ours, e.g. `model.layers.3.self_attn.q_proj`."""
    return f"{family.backbone}{family.layer.format(i=layer)}{family.modules[module]}"


def projection_rows(family: Family, shape: ModelShape, projection: str) -> Part:
    """A projection's rows (outputs) in the family's matrix that holds it."""
    if projection in "qkv" and family.fused_qkv == "interleaved":
        parts = qkv_parts(shape.num_attention_heads, shape.num_query_groups, shape.head_dim)
        return dict(zip("qkv", parts, strict=True))[projection]
    if projection in "qkv" and family.fused_qkv == "stacked":
        sizes = [shape.projection(name)[0] for name in "qkv"]
        start = sum(sizes[: "qkv".index(projection)])
        return Part(projection, 1, start, start + shape.projection(projection)[0], sum(sizes))
    return whole(projection, shape.projection(projection)[0])[0]


def projection_piece(family: Family, shape: ModelShape, layer: int, projection: str, kind: str) -> Piece:
    """Where the family keeps the `kind` (weight or bias) of a projection of global layer `layer`."""
    tensor = f"{module_path(family, layer, projection)}.{kind}"
    rows = projection_rows(family, shape, projection)
    if kind == "bias":
        return Piece(tensor, rows)
    return Piece(tensor, rows, shape.projection(projection)[1], family.transposed)


def pieces_of(family: Family, shape: ModelShape, name: str) -> list[tuple[str, Piece]]:
    """(projection or "", piece) of our base parameter `name`, in the order of its fused rows."""
    hidden = shape.hidden_size
    if name == EMBEDDING:
        return [("", _table(family.backbone + family.embedding, shape.vocab_size, hidden))]
    if name == OUTPUT:
        return [("", _table(family.head, shape.vocab_size, hidden))]
    if name == POSITIONS:
        skipped, length = family.unused_positions, shape.max_position_embeddings
        return [("", _table(family.backbone + family.positions, length, hidden, skipped=skipped))]
    if name.startswith("decoder.final_layernorm."):
        kind = name.rpartition(".")[2]
        return [("", Piece(f"{family.backbone}{family.final_norm}.{kind}", whole("", hidden)[0]))]
    match = _LAYER.match(name)
    assert match, name
    layer, module, kind = int(match[1]), match[2], match[3]
    if names := projections_of(module, shape):
        return [(p, projection_piece(family, shape, layer, p, kind)) for p in names]
    width = shape.head_dim if module in ("q_layernorm", "k_layernorm") else hidden
    return [("", Piece(f"{module_path(family, layer, module)}.{kind}", whole("", width)[0]))]


def _table(tensor: str, rows: int, columns: int, *, skipped: int = 0) -> Piece:
    return Piece(tensor, Part("", 1, skipped, skipped + rows, skipped + rows), columns)


def stored_shapes(family: Family, shape: ModelShape, names: set[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(tensor of the family, its shape) for all our base parameters `names`; a fused tensor comes several times."""
    for name in sorted(names):
        for _, piece in pieces_of(family, shape, name):
            yield piece.tensor, piece.stored_shape

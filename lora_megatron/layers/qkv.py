# SPDX-License-Identifier: Apache-2.0
"""Which rows of a fused linear layer belong to which projection: the only place that knows.

Megatron's fused QKV is interleaved per query group: with g groups of p query heads each, its rows are

    [q_1 .. q_p k v | q_1 .. q_p k v | ...]        g times (p + 2) heads of d rows

so a cut into equal thirds mixes projections. A gated fc1 is [gate; up] on every rank. Both are "g groups of `stride`
rows, of which one projection owns rows start..stop"; tensor ranks hold whole groups (QKV) or their rows of each half
(gated fc1), so the same description with local sizes serves a shard.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Part:
    """One projection's rows inside a fused output of `groups` x `stride` rows."""

    name: str
    groups: int
    start: int
    stop: int
    stride: int

    @property
    def rows(self) -> int:
        """Rows this projection owns."""
        return self.groups * (self.stop - self.start)

    def of(self, fused: Tensor) -> Tensor:
        """A view of this projection in `fused`: [..., groups * stride] -> [..., groups, stop - start]."""
        return fused.unflatten(-1, (self.groups, self.stride))[..., self.start : self.stop]

    def rows_of(self, fused: Tensor) -> Tensor:
        """A view of this projection's rows: [groups * stride, ...] -> [groups, stop - start, ...]."""
        return fused.unflatten(0, (self.groups, self.stride))[:, self.start : self.stop]


def qkv_parts(heads: int, groups: int, head_dim: int) -> tuple[Part, Part, Part]:
    """q, k and v of a fused QKV with `heads` query heads in `groups` query groups (local numbers on a shard)."""
    queries = heads // groups * head_dim
    stride = queries + 2 * head_dim
    return (
        Part("q", groups, 0, queries, stride),
        Part("k", groups, queries, queries + head_dim, stride),
        Part("v", groups, queries + head_dim, stride, stride),
    )


def gated_parts(rows: int) -> tuple[Part, Part]:
    """gate and up of a gated fc1 whose halves have `rows` rows each (local numbers on a shard)."""
    return Part("gate", 1, 0, rows, 2 * rows), Part("up", 1, rows, 2 * rows, 2 * rows)


def whole(name: str, rows: int) -> tuple[Part]:
    """The single projection of an unfused layer."""
    return (Part(name, 1, 0, rows, rows),)

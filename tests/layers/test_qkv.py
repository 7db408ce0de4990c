# SPDX-License-Identifier: Apache-2.0
"""The map of a fused QKV against a naive loop over its rows, and the in-place addition against one that is not."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_megatron.layers.qkv import gated_parts, qkv_parts, whole


def rows_by_loop(queries_per_group: int, groups: int, head_dim: int) -> dict[str, list[int]]:
    """Row numbers of q, k and v, walking down the fused matrix group by group, head by head."""
    rows: dict[str, list[int]] = {"q": [], "k": [], "v": []}
    row = 0
    for _ in range(groups):
        for name in ["q"] * queries_per_group + ["k", "v"]:
            for _ in range(head_dim):
                rows[name].append(row)
                row += 1
    return rows


sizes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))


@settings(deadline=None)
@given(sizes)
def test_parts_are_the_rows_of_a_naive_loop(size: tuple[int, int, int]) -> None:
    per_group, groups, head_dim = size
    want = rows_by_loop(per_group, groups, head_dim)
    fused = torch.arange((per_group + 2) * groups * head_dim)
    for part in qkv_parts(per_group * groups, groups, head_dim):
        assert part.of(fused).flatten().tolist() == want[part.name]
        assert part.rows == len(want[part.name])


@settings(deadline=None)
@given(sizes)
def test_whole_groups_on_a_rank_are_a_smaller_map(size: tuple[int, int, int]) -> None:
    """Cutting the rows of a fused matrix over ranks cuts each projection's rows in order."""
    per_group, groups, head_dim = size
    rows = torch.arange((per_group + 2) * 2 * groups * head_dim)
    full = qkv_parts(per_group * 2 * groups, 2 * groups, head_dim)
    local = qkv_parts(per_group * groups, groups, head_dim)
    for whole_part, local_part in zip(full, local, strict=True):
        cut = torch.cat([local_part.of(half).flatten() for half in rows.chunk(2)])
        assert torch.equal(cut, whole_part.of(rows).flatten())


def test_gate_comes_before_up() -> None:
    gate, up = gated_parts(3)
    assert (gate.of(torch.arange(6)).flatten().tolist(), up.of(torch.arange(6)).flatten().tolist()) == (
        [0, 1, 2],
        [3, 4, 5],
    )
    assert whole("o", 4)[0].rows == 4

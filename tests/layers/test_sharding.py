# SPDX-License-Identifier: Apache-2.0
"""A declaration of sharding cuts and joins without loss, whatever the axis, blocks, padding and number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_megatron.layers.sharding import REPLICATED, Shard, declare, is_summed_over_sequence_shards, shard_of

whole_numbers = st.integers(1, 5)


@st.composite
def cuts(draw: Any) -> tuple[Shard, torch.Tensor, int]:
    """A declaration, a full tensor it fits, and a number of ranks."""
    size, blocks, rows, columns = (
        draw(st.sampled_from([1, 2, 4])),
        draw(st.sampled_from([1, 2, 3])),
        *draw(st.tuples(whole_numbers, whole_numbers)),
    )
    axis = draw(st.sampled_from([None, 0, 1]))
    padding = draw(st.integers(0, size * rows - 1)) if axis == 0 and draw(st.booleans()) else 0
    if padding:
        blocks = 1  # a vocabulary is padded, a gated fc1 is in blocks, nothing is both
    shape = [rows, columns]
    if axis is not None:
        shape[axis] *= size * blocks
    if padding:
        shape[0] -= padding
    full = torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape) + 1
    return Shard(axis, blocks if axis is not None else 1, padding), full, size


class Slices:
    """What a safetensors slice offers: indexing, and nothing else."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.tensor[index]


@settings(deadline=None, max_examples=200)
@given(cuts())
def test_parts_join_to_the_full_tensor(cut: tuple[Shard, torch.Tensor, int]) -> None:
    shard, full, size = cut
    parts = [shard.part(full, full.shape, rank, size) for rank in range(size)]
    assert len({part.shape for part in parts}) == 1
    assert torch.equal(shard.join(parts), full)
    assert shard.full_shape(parts[0].shape, size) == tuple(full.shape)
    if shard.axis is not None:
        assert sum(part.numel() for part in parts) == full.numel() + shard.padding * full.shape[1]
        assert float(sum(part.sum() for part in parts)) == float(full.sum()), "padding is zeros"


@settings(deadline=None, max_examples=50)
@given(cuts())
def test_a_part_needs_nothing_but_slices(cut: tuple[Shard, torch.Tensor, int]) -> None:
    shard, full, size = cut
    for rank in range(size):
        assert torch.equal(shard.part(Slices(full), full.shape, rank, size), shard.part(full, full.shape, rank, size))


@settings(deadline=None, max_examples=50)
@given(cuts(), st.sampled_from([1, 2, 4]))
def test_resharding_goes_through_the_full_tensor(cut: tuple[Shard, torch.Tensor, int], other: int) -> None:
    """4 ranks to 2 is 4 ranks to 1 to 2: a rank of the coarser cut holds the rows of two of the finer."""
    shard, full, size = cut
    coarse = min(size, other)
    shard = Shard(shard.axis, shard.blocks)
    if shard.axis is not None and full.shape[shard.axis] % (size * shard.blocks):
        return
    again = shard.join([shard.part(full, full.shape, rank, size) for rank in range(size)])
    assert torch.equal(shard.part(again, full.shape, 0, coarse), shard.part(full, full.shape, 0, coarse))


def test_a_gated_part_holds_rows_of_both_halves() -> None:
    full = torch.arange(8.0)
    assert Shard(0, blocks=2).part(full, (8,), 1, 2).tolist() == [2, 3, 6, 7]


def test_padding_falls_on_the_last_ranks() -> None:
    full = torch.arange(1.0, 6.0).view(5, 1)  # five rows in memory for eight
    parts = [Shard(0, padding=3).part(full, (5, 1), rank, 4).flatten().tolist() for rank in range(4)]
    assert parts == [[1, 2], [3, 4], [5, 0], [0, 0]]


def test_a_declaration_is_read_by_us_and_by_megatron() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4, 2))
    with pytest.raises(AssertionError, match="no sharding declaration"):
        shard_of(parameter)
    declare(parameter, Shard(1, 2))
    assert shard_of(parameter) == Shard(1, 2)
    assert (parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride) == (True, 1, 2)
    declare(parameter, REPLICATED, sum_over_sequence_shards=True)
    assert shard_of(parameter) is REPLICATED
    assert (parameter.tensor_model_parallel, is_summed_over_sequence_shards(parameter)) == (False, True)


def test_a_sharded_parameter_is_no_partial_sum() -> None:
    with pytest.raises(AssertionError):
        declare(torch.nn.Parameter(torch.zeros(4)), Shard(0), sum_over_sequence_shards=True)

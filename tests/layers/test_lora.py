# SPDX-License-Identifier: Apache-2.0
"""Seeds, scales and dropout masks: the same numbers on every machine and every cut."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_megatron.layers.dropout import Dropout, set_first_sample
from lora_megatron.layers.lora import scaling, seed_from


def test_seeds_never_change() -> None:
    """Adapters name their seed, and A is rebuilt from it: these values are a contract."""
    assert seed_from(7, "lora_A", "decoder.layers.0.self_attention.linear_qkv.q") == 585464659661632773
    assert seed_from() == 6510301506637419378


@given(st.lists(st.text(alphabet="ab1", max_size=3), max_size=4), st.lists(st.text(alphabet="ab1"), max_size=4))
def test_different_parts_give_different_seeds(one: list[str], other: list[str]) -> None:
    """Also when the parts run together to the same text."""
    assert (seed_from(*one) == seed_from(*other)) == ("\x1f".join(one) == "\x1f".join(other))
    assert 0 <= seed_from(*one) < 2**63


def test_scales() -> None:
    assert scaling(16, 4) == 4
    assert scaling(16, 4, rank_stabilised=True) == 8
    assert scaling(1, 1) == scaling(1, 1, rank_stabilised=True) == 1


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(0, 100))
def test_cut_masks_are_the_parts_of_one_mask(sequence: int, features: int, sample: int) -> None:
    x = torch.ones(8, 3, 16)
    whole = Dropout(0.5, 5, sample)(x)
    rows = []
    for rank, shard in enumerate(x.chunk(sequence, 0)):
        pieces = [
            Dropout(0.5, 5, sample, sequence=(rank, sequence), features=(index, features))(piece)
            for index, piece in enumerate(shard.chunk(features, 2))
        ]
        rows.append(torch.cat(pieces, 2))
    assert torch.equal(torch.cat(rows, 0), whole)


def test_masks_depend_on_sample_and_seed_alone() -> None:
    x = torch.ones(16, 2, 32)
    set_first_sample(4)
    one = Dropout.of_this_microbatch(0.5, 5)(x)
    assert torch.equal(one, Dropout(0.5, 5, 4)(x))
    assert not torch.equal(one, Dropout(0.5, 6, 4)(x))
    assert not torch.equal(one[:, 0], one[:, 1])
    # sample 5 stood in the second column, now in the first
    assert torch.equal(Dropout(0.5, 5, 5)(x)[:, 0], one[:, 1])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_the_mean(p: float) -> None:
    x = torch.ones(128, 4, 128)
    out = Dropout(p, 1, 0)(x)
    kept = float((out != 0).float().mean())
    assert kept == pytest.approx(1 - p, abs=5 * math.sqrt(p * (1 - p) / x.numel()))  # five standard deviations
    assert torch.allclose(out[out != 0], torch.tensor(1 / (1 - p)))

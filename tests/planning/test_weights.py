# SPDX-License-Identifier: Apache-2.0
"""Bytes of weights in every storage, of padded buffers and of sharded state, against sums done by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lora_megatron.config import BaseSection
from lora_megatron.planning.transposes import unpacked_bytes
from lora_megatron.planning.weights import Weight, as_fully_trained, frozen_bytes, trained_bytes, turned_head_bytes

LINEAR = Weight("decoder.layers.0.mlp.linear_fc1.weight", (512, 128), 2, trained=False, full_shape=(1024, 128))
EMBEDDING = Weight("embedding.word_embeddings.weight", (1000, 128), 2, trained=False, full_shape=(1000, 128))
BIAS = Weight("decoder.layers.0.mlp.linear_fc1.bias", (512,), 2, trained=False, full_shape=(1024,))
A = Weight("decoder.layers.0.mlp.linear_fc1.adapters.fc1.lora_A", (3, 100), 2, trained=True, full_shape=(3, 100))
B = Weight("decoder.layers.0.mlp.linear_fc1.adapters.fc1.lora_B", (50, 3), 2, trained=True, full_shape=(100, 3))


def sharded(sharding: str, rank: int = 0, size: int = 2, precision: str = "bf16") -> tuple[int, int, int]:
    done = trained_bytes([LINEAR, A, B], sharding=sharding, precision=precision, data_size=size, data_rank=rank)
    return done.weights, done.gradients, done.optimizer


@pytest.mark.parametrize(
    ("storage", "linear"),
    [
        (None, 2 * 512 * 128),
        ("bf16", 2 * 512 * 128),
        ("fp8", 512 * 128 + 4 * 512),  # and an fp32 scale for each row
        # 1024 blocks of 64; a row's blocks are a group with a lowest and a step, and a row has an FP8 scale; 16 levels.
        ("nf4", 512 * 128 // 2 + 1024 + 3 * 4 * 512 + 4 * 16),
    ],
)
def test_only_linear_weights_are_packed(storage: str | None, linear: int) -> None:
    rest, base = 2 * (1000 * 128 + 512), BaseSection.model_validate({"storage": storage})
    assert frozen_bytes([LINEAR, EMBEDDING, BIAS, A, B], base) == linear + rest


def test_an_output_layer_in_fp8_keeps_the_table_only_where_tokens_are_looked_up() -> None:
    base, size, in_fp8 = BaseSection(head="fp8"), 1000 * 128, 1000 * 128 + 4 * 1000
    table, copy = replace(EMBEDDING, is_head=True), replace(EMBEDDING, is_head=True, is_copy=True)
    own = replace(EMBEDDING, name="output_layer.weight", is_head=True)
    heads = [[table], [copy], [EMBEDDING, own], [EMBEDDING]]
    assert [frozen_bytes(head, base) for head in heads] == [2 * size + in_fp8, in_fp8, 2 * size + in_fp8, 2 * size]
    assert [turned_head_bytes(head, base) for head in heads] == [size, size, size, 0]
    assert [turned_head_bytes(head, BaseSection(storage="fp8")) for head in heads] == [0] * 4


def test_a_packed_weight_is_unpacked_for_its_product() -> None:
    def unpacked(*read_backward: str, **base: Any) -> int:
        return unpacked_bytes([LINEAR, EMBEDDING, A], BaseSection(**base), read_backward=read_backward)

    for names in ((), (LINEAR.name,)):
        assert unpacked(*names, storage="nf4") == 2 * 512 * 128
        assert unpacked(*names, storage="nf4", gemm="fp8") == 512 * 128
        assert unpacked(*names, storage="fp8") == len(names) * 512 * 128, "read as it is stored, except backward"
        assert unpacked(*names, storage="bf16") == 0


def test_unsharded_state_is_twelve_bytes_in_bf16_and_eight_in_fp32() -> None:
    assert sharded("none") == (2 * 450, 4 * 450, 12 * 450)
    assert sharded("none", precision="fp32")[2] == 8 * 450


def test_megatron_pads_its_buffer_and_shares_its_elements_out() -> None:
    """B stands at 0 .. 150, A at 192 .. 492, the buffer ends at 512; halves own 150 + 64 and 236 of them."""
    assert sharded("megatron", 0) == (2 * 512, 4 * 512, 12 * (150 + 64))
    assert sharded("megatron", 1) == (2 * 512, 4 * 512, 12 * 236)
    assert sum(sharded("megatron", rank, 3)[2] for rank in range(3)) == 12 * 450
    assert sharded("megatron", 0, 3)[1] == 4 * 768  # 768 = 6 x 128 is the next multiple of 3 and 128


def test_a_shared_embedding_has_a_bucket_of_its_own() -> None:
    shared = Weight("embedding.word_embeddings.weight", (100,), 2, trained=True, own_bucket=True, full_shape=(100,))
    done = trained_bytes([shared, A], sharding="megatron", precision="bf16", data_size=2, data_rank=0)
    assert done.gradients == 4 * (384 + 128)  # A alone up to 384, then the embedding
    assert done.optimizer == 12 * (192 + 64)


def test_deepspeed_pads_to_two_elements_a_rank() -> None:
    assert sharded("deepspeed", size=4) == (2 * 456, 4 * 450, 12 * 114)
    assert sharded("deepspeed", size=4, precision="fp32")[2] == 12 * 114


def test_full_fine_tuning_trains_everything_and_has_no_adapter() -> None:
    table = Weight("table", (7,), 8, trained=False)
    whole = as_fully_trained([LINEAR, EMBEDDING, A, B, table])
    assert [weight.name for weight in whole if weight.trained] == [LINEAR.name, EMBEDDING.name]
    assert [weight.name for weight in whole if not weight.trained] == ["table"], "a buffer is no parameter"

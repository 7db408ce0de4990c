# SPDX-License-Identifier: Apache-2.0
"""FLOPs against the arithmetic of GPT-3 and sums done by hand; the schedule; the estimate against the paper's speed."""

from __future__ import annotations

from typing import Any

import pytest

from lora_megatron.config import Config, parse_config
from lora_megatron.methods.choose import choose_method
from lora_megatron.methods.method import Method
from lora_megatron.model.presets import resolve_shape
from lora_megatron.model.shape import ModelShape
from lora_megatron.planning.activations import ChunkBytes
from lora_megatron.planning.flops import Flops, stage_flops, step_flops, token_flops, visible_keys
from lora_megatron.planning.gpus import GPUS
from lora_megatron.planning.plan import plan_training
from lora_megatron.planning.schedule import passes, peak


def resolved(**sections: Any) -> tuple[Config, ModelShape, Method]:
    config = parse_config(sections)
    shape = resolve_shape(config.model, tokenizer_vocab_size=config.model.vocab_size or 50257)
    return config, shape, choose_method(config.method, num_layers=shape.num_layers)


def gpt3(method: dict[str, Any], recompute: str = "none", **parallel: int) -> Flops:
    return token_flops(
        *resolved(
            model={"preset": "gpt3-175b"},
            method=method,
            parallel=parallel,
            train={"precision": "bf16", "recompute": recompute},
            data={"sequence_length": 2048},
        )
    )


LORA, FULL = {"targets": {"q": 4, "v": 4}}, {"name": "full"}


@pytest.mark.parametrize(
    ("method", "recompute", "tera"),
    [(FULL, "none", 1.064), (FULL, "full", 1.417), (LORA, "none", 0.714), (LORA, "full", 1.068)],
    ids=["full", "full-recompute", "lora", "lora-recompute"],
)
def test_executed_flops_of_gpt3(method: dict[str, Any], recompute: str, tera: float) -> None:
    assert gpt3(method, recompute).hardware / 1e12 == pytest.approx(tera, abs=6e-4)


def test_a_rebuilt_mlp_is_one_more_product_of_fc1() -> None:
    """With its adapters' B, but not A: u is kept. Core attention's recomputation comes on top."""
    model, method = {"preset": "tiny", "vocab_size": 128}, {"targets": {"q": 2, "fc1": 3}}

    def executed(**train: Any) -> float:
        found = token_flops(*resolved(model=model, method=method, train=train, data={"sequence_length": 32}))
        return found.hardware

    none, fc1 = executed(), 2 * 64 * 256 + 2 * 3 * 256
    mlp = {"recompute": "selective", "recompute_modules": ["mlp"]}
    assert executed(**mlp, recompute_layers=1) - none == fc1
    assert executed(**mlp) - none == 2 * fc1
    both = {"recompute": "selective", "recompute_modules": ["mlp", "core_attn"]}
    assert executed(**both) - none == 2 * fc1 + executed(recompute="selective") - none


def test_recomputation_is_the_papers_ratio_of_speeds() -> None:
    """43.1 / 32.5 tokens/s = 1.326 is what 4N + 2N against 6N + 2N gives."""
    assert gpt3(FULL, "full").hardware / gpt3(LORA, "full").hardware == pytest.approx(43.1 / 32.5, rel=0.005)


def test_model_flops_know_nothing_of_how_it_is_run() -> None:
    plain = gpt3(LORA).model
    assert plain < gpt3(LORA).hardware
    assert gpt3(LORA, "full", tensor=8, pipeline=12).model == pytest.approx(plain)


def tiny(method: dict[str, Any], **more: Any) -> tuple[Config, ModelShape, Method]:
    """2 layers of width 64, MLP 256, 4 heads; sequences of 32 tokens."""
    model = {"preset": "tiny", "vocab_size": 128}
    return resolved(model=model, method=method, data={"sequence_length": 32, "global_batch_size": 8}, **more)


LAYER, ATTENTION, HEAD = 12 * 64 * 64, 4 * 16.5 * 64, 64 * 128


def test_frozen_layers_cost_four_per_weight_trained_ones_six() -> None:
    full = token_flops(*tiny(FULL))
    assert full.model == 2 * (6 * LAYER + 3 * ATTENTION) + 6 * HEAD
    assert full.hardware == 2 * (6 * LAYER + 3.5 * ATTENTION) + 6 * HEAD
    lora = token_flops(*tiny({"targets": {"q": 2}}))
    qkv, pairs = 3 * 64 * 64, 2 * 2 * 128  # a pair of rank 2 has 2 x 128 weights, on two layers
    below = 2 * qkv + 2 * 2 * 64  # the first layer's input needs no gradient: no dgrad of qkv, none of its A
    assert lora.model == 2 * (4 * LAYER + 3 * ATTENTION) + 4 * HEAD + 6 * pairs - below


def test_nothing_goes_down_below_the_lowest_adapter() -> None:
    upper = token_flops(*tiny({"targets": {"fc2": 2}, "layers": {"0": {"fc2": 0}}}))
    pair = 2 * (64 + 256)
    above = 2 * LAYER + ATTENTION + 6 * pair - 2 * 2 * 256  # fc2's input needs no gradient, nor does attention's
    assert upper.model == (2 * LAYER + ATTENTION) + above + 4 * HEAD


def test_a_later_stage_passes_the_gradient_on_though_nobody_needs_it() -> None:
    method = {"targets": {"fc2": 2}, "layers": {"0": {"fc2": 0}}}
    cut = tiny(method, parallel={"pipeline": 2})
    whole, upper = token_flops(*tiny(method)), stage_flops(*cut, 1)
    assert token_flops(*cut).model == whole.model
    assert upper.hardware - upper.model == 2 * LAYER + 2.5 * ATTENTION + 2 * 2 * 256


def test_a_step_is_every_token_of_the_global_batch() -> None:
    assert step_flops(*tiny(FULL)).model == token_flops(*tiny(FULL)).model * 8 * 32


def test_a_window_bounds_the_keys() -> None:
    config, shape, _ = tiny(FULL)
    assert visible_keys(config, shape, 0) == 16.5
    config, shape, _ = resolved(
        model={"preset": "tiny", "sliding_window": 4, "full_attention_layers": 1}, data={"sequence_length": 8}
    )
    assert visible_keys(config, shape, 0) == 4.5
    assert visible_keys(config, shape, 1) == (1 + 2 + 3 + 4 * 5) / 8


@pytest.mark.parametrize(("stage", "microbatches", "in_flight"), [(0, 8, 4), (1, 8, 3), (3, 8, 1), (0, 2, 2)])
def test_1f1b_holds_what_is_left_of_the_pipeline(stage: int, microbatches: int, in_flight: int) -> None:
    worst = peak(stage, 4, [ChunkBytes(10.0, 1.0, 0.0)], microbatches)
    assert (worst.activations, worst.loss) == (10.0 * in_flight, in_flight)


def test_every_chunk_passes_every_microbatch_both_ways() -> None:
    order = list(passes(1, 4, 3, 8))
    assert len(order) == 2 * 3 * 8
    for chunk in range(3):
        assert order.count((True, chunk)) == order.count((False, chunk)) == 8
    assert order[0] == (True, 0)
    assert order[-1] == (False, 0)


def test_a_rebuilt_layer_comes_when_the_loss_is_gone() -> None:
    assert peak(0, 1, [ChunkBytes(10.0, 100.0, 50.0)], 1).bytes == 110
    assert peak(0, 1, [ChunkBytes(10.0, 5.0, 50.0)], 1).bytes == 50


def test_the_estimate_is_near_the_papers_throughput() -> None:
    """The paper: 43.1 tokens/s per V100 with LoRA and 32.5 with full fine-tuning, on a cut it does not tell."""
    config, shape, method = resolved(
        model={"preset": "gpt3-175b"},
        parallel={"tensor": 8, "pipeline": 12},
        train={"precision": "bf16", "recompute": "full"},
        data={"sequence_length": 2048, "global_batch_size": 128},
    )
    plan = plan_training(config, shape, method, world_size=96)
    assert plan.speed(GPUS["v100"]).tokens_per_second_per_gpu == pytest.approx(43.1, rel=0.15)
    assert plan.full_speed(GPUS["v100"]).tokens_per_second_per_gpu == pytest.approx(32.5, rel=0.15)


def test_an_output_layer_in_fp8_counts_at_its_rate() -> None:
    """On the last of two stages, 2 x 2.5 TFLOP of 2,048 tokens and 50,304 columns at half of 989 TFLOP/s: 10.24 ms in
    16 bits, half of that and a little less in FP8, for each of 4 microbatches and once more for the bubble."""
    seconds = {}
    for head in ("bf16", "fp8"):
        config, shape, method = resolved(
            model={"preset": "gpt3-175b"},
            base={"head": head},
            parallel={"pipeline": 2},
            train={"precision": "bf16"},
            data={"sequence_length": 2048, "global_batch_size": 4},
        )
        plan = plan_training(config, shape, method, world_size=2)
        seconds[head, "h200"], seconds[head, "a100"] = (
            plan.speed(GPUS[name]).step_seconds for name in ("h200", "a100")
        )
    head = 2 * 2 * 2048 * 12288 * 50304 / (0.5 * 989e12)
    assert head == pytest.approx(10.24e-3, rel=1e-3)
    # The stages differ by the head alone; without it the first may be as slow.
    saved = seconds["bf16", "h200"] - seconds["fp8", "h200"]
    assert saved == pytest.approx(5 * head * (1 - 989 / 1979), rel=1e-6)
    assert seconds["bf16", "a100"] == seconds["fp8", "a100"], "it has none"

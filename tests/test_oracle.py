# SPDX-License-Identifier: Apache-2.0
"""Every layout equals the unsharded single process: forward, every trained gradient, gradient norm, AdamW steps.

All variants of a layout run in one world, on the first test that asks for one of them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from lora_megatron.config import parse_config
from lora_megatron.errors import ConfigError
from lora_megatron.methods.choose import choose_method
from lora_megatron.model.checks import check
from lora_megatron.model.presets import resolve_shape
from lora_megatron.model.recomputation import NOTHING_RECOMPUTED
from lora_megatron.parallel.groups import Layout
from tests.comparison import Mismatch, compare, frobenius
from tests.pool import Pool
from tests.twin import Experiment, Record, train_twins

GPT = Experiment()
LLAMA = Experiment(model={"preset": "tiny-llama", "num_layers": 4})  # two query groups of two heads, SwiGLU
DROPOUT = replace(GPT, dropout=0.3, steps=2)
_ROPE_GPT = {"preset": "tiny", "num_layers": 4, "position": "rope"}
NEOX = Experiment(model={**_ROPE_GPT, "parallel_residual": True, "rotary_percent": 0.5, "tied_embeddings": False})
QWEN3 = Experiment(  # everything trains, so that q's and k's norms do: their gradient is a sum over heads of all ranks
    model={**LLAMA.model, "qk_norm": True, "qkv_bias": True, "sliding_window": 5, "full_attention_layers": 2},
    method={"name": "full"},
    steps=2,
)
MLP: dict[str, Any] = {"recompute": "selective", "recompute_modules": ("mlp",)}
VARIANTS: dict[str, Experiment] = {
    "gpt": GPT,
    "llama": LLAMA,
    "neox": NEOX,
    "neox-full-recompute": replace(NEOX, recompute="full", steps=2),
    "qwen3-full": QWEN3,
    "gpt-full-recompute": replace(GPT, recompute="full", steps=2),
    "gpt-one-layer-recomputed": replace(GPT, recompute="full", recompute_layers=1, steps=2),
    "gpt-two-layers-recomputed-together": replace(GPT, recompute="full", recompute_unit=2, steps=2),
    "gpt-selective-recompute": replace(GPT, recompute="selective", steps=2),
    "llama-full-recompute": replace(LLAMA, recompute="full", steps=2),
    "gpt-mlp-recompute": replace(GPT, **MLP, steps=2),
    "neox-mlp-recompute": replace(NEOX, **MLP, recompute_layers=1, steps=2),
    "llama-mlp-and-attention-recompute": replace(
        LLAMA, recompute="selective", recompute_modules=("core_attn", "mlp"), steps=2
    ),
    "dropout": DROPOUT,
    "dropout-full-recompute": replace(DROPOUT, recompute="full"),
    "dropout-mlp-recompute": replace(DROPOUT, **MLP),
    "llama-dropout-micro-batch-2": replace(LLAMA, dropout=0.3, steps=2, micro_batch_size=2),
    "label-smoothing": replace(GPT, label_smoothing=0.1, steps=2),
    "label-smoothing-full": replace(GPT, label_smoothing=0.1, method={"name": "full"}, steps=2),
    "packing": replace(GPT, packing=True, steps=2),
    "micro-batch-2": replace(GPT, micro_batch_size=2, steps=2),
    "q-v-only": replace(LLAMA, method={"targets": {"q": 1, "v": 3}}, steps=2),
    "k-only-rank-1": replace(GPT, method={"targets": {"k": 1}}, steps=2),
    "ranks-per-layer": replace(
        GPT, method={"targets": {"q": 2}, "layers": {"0": {"q": 0, "fc2": 1}, "2-3": {"o": 3, "q": 1}}}, steps=2
    ),
    "rslora": replace(GPT, method={"targets": {"q": 4, "o": 9}, "scaling": "rslora", "alpha": 4}, steps=2),
}
ALL = tuple(VARIANTS)
MAIN = ("gpt", "llama")
SMOOTHED = ("label-smoothing", "label-smoothing-full")
RECOMPUTE = (
    "gpt-full-recompute",
    "gpt-one-layer-recomputed",
    "gpt-selective-recompute",
    "llama-full-recompute",
    "neox-full-recompute",
    "gpt-mlp-recompute",
    "neox-mlp-recompute",
    "llama-mlp-and-attention-recompute",
)
TOGETHER = "gpt-two-layers-recomputed-together"
MORE_ON_TP2 = (
    "neox-full-recompute",
    "gpt-one-layer-recomputed",
    "gpt-selective-recompute",
    "llama-full-recompute",
    "neox-mlp-recompute",
    TOGETHER,
    "dropout-full-recompute",
    "llama-dropout-micro-batch-2",
    "label-smoothing",
    "k-only-rank-1",
    "rslora",
)
"""On two tensor ranks slow ones: each is in every run on `tp2-sp`, and most on `pp2` or `tp4-sp` too."""
SLOW = ("tp2, more", "tp4")
"""Layouts; of four tensor ranks those with sequence parallelism are in every run."""
DROPOUTS = ("dropout", "dropout-full-recompute", "dropout-mlp-recompute", "llama-dropout-micro-batch-2")
# Name of a layout -> world size, layout, the variants that run on it.
LAYOUTS: dict[str, tuple[int, Layout, tuple[str, ...]]] = {
    "one": (1, Layout(), ALL),
    "tp2": (2, Layout(tensor=2), tuple(variant for variant in ALL if variant not in MORE_ON_TP2)),
    "tp2, more": (2, Layout(tensor=2), MORE_ON_TP2),
    "tp4": (4, Layout(tensor=4), ("gpt", "dropout", "k-only-rank-1", "rslora", *SMOOTHED)),
    "tp2-sp": (2, Layout(tensor=2, sequence=True), ALL),
    "tp4-sp": (4, Layout(tensor=4, sequence=True), ("gpt", "dropout", "k-only-rank-1")),
    "pp2": (
        2,
        Layout(pipeline=2),
        (
            *(*MAIN, *RECOMPUTE, TOGETHER, *DROPOUTS, *SMOOTHED),
            *("packing", "micro-batch-2", "ranks-per-layer", "neox", "qwen3-full"),
        ),
    ),
    "pp4": (4, Layout(pipeline=4), (*MAIN, "ranks-per-layer")),
    "vpp2": (2, Layout(pipeline=2, virtual_pipeline=2), (*MAIN, *RECOMPUTE, *DROPOUTS)),
    "dp2": (2, Layout(), (*MAIN, "dropout", "gpt-full-recompute")),
    "tp2-pp2": (4, Layout(tensor=2, pipeline=2), (*MAIN, "packing")),
    "tp2-sp-pp2": (
        4,
        Layout(tensor=2, pipeline=2, sequence=True),
        (*MAIN, "dropout-full-recompute", "dropout-mlp-recompute"),
    ),
    "tp2-sp-vpp2": (4, Layout(tensor=2, pipeline=2, virtual_pipeline=2, sequence=True), (*MAIN, "dropout")),
    "tp2-sp-dp2": (4, Layout(tensor=2, sequence=True), (*MAIN, "dropout")),
    "pp2-dp2": (4, Layout(pipeline=2), MAIN),
}
CASES = [
    pytest.param(layout, variant, marks=[pytest.mark.slow] if layout in SLOW else [])
    for layout, (_, _, variants) in LAYOUTS.items()
    if layout != "one"
    for variant in variants
]

_records: dict[str, dict[str, Any]] = {}


def records(pool: Pool, name: str) -> dict[str, Record]:
    """The records of every variant on a layout, computed once."""
    if name not in _records:
        world, layout, variants = LAYOUTS[name]
        experiments = [replace(VARIANTS[variant], layout=layout) for variant in variants]
        _records[name] = dict(zip(variants, pool.run(world, train_twins, experiments=experiments)[0], strict=True))
    return _records[name]


def twin(pool: Pool, variant: str) -> Record:
    """The unsharded run that a variant must repeat: the one that keeps its activations."""
    stored = replace(VARIANTS[variant], **NOTHING_RECOMPUTED)
    same = next((name for name, experiment in VARIANTS.items() if replace(experiment, steps=stored.steps) == stored))
    record = records(pool, "one")[same]
    return {**record, **{kind: record[kind][: stored.steps] for kind in ("loss", "norm", "grads", "values")}}


@pytest.mark.parametrize(("layout", "variant"), CASES)
def test_layout_equals_unsharded(pool: Pool, layout: str, variant: str) -> None:
    assert compare(records(pool, layout)[variant], twin(pool, variant)) >= 20


@pytest.mark.parametrize("variant", [*RECOMPUTE, TOGETHER, "dropout-full-recompute", "dropout-mlp-recompute"])
def test_recompute_equals_stored_activations(pool: Pool, variant: str) -> None:
    """The same forward, bit for bit; the backward adds up a layer's gradients in another order."""
    recomputed, stored = records(pool, "one")[variant], twin(pool, variant)
    # 1.2e-5 of the largest value was seen, with torch 2.11 on another processor.
    assert compare(recomputed, stored, tolerance=3e-5) > 100
    assert recomputed["loss"][0] == stored["loss"][0]


def test_dropout_acts_in_training_only(pool: Pool) -> None:
    with_dropout, without = records(pool, "one")["dropout"], twin(pool, "micro-batch-2")
    assert abs(with_dropout["loss"][0] - without["loss"][0]) > 1e-4
    assert with_dropout["eval"] == pytest.approx(without["eval"], rel=1e-6)
    assert with_dropout["loss"][0] != with_dropout["eval"]


def test_labels_are_smoothed_in_training_only(pool: Pool) -> None:
    smoothed, without = records(pool, "one")["label-smoothing"], twin(pool, "micro-batch-2")
    assert smoothed["eval"] == pytest.approx(without["eval"], rel=1e-6)
    assert abs(smoothed["loss"][0] - without["loss"][0]) > 1e-4


def test_evaluation_is_the_loss_of_the_first_step(pool: Pool) -> None:
    for layout in ("one", "tp2-sp", "pp2", "vpp2"):
        record = records(pool, layout)["gpt"]
        assert record["eval"] == pytest.approx(record["loss"][0], rel=1e-6)


def test_the_size_of_a_micro_batch_changes_nothing(pool: Pool) -> None:
    assert compare(records(pool, "one")["micro-batch-2"], {**twin(pool, "gpt"), **_first(twin(pool, "gpt"), 2)}) > 100


def _first(record: Record, steps: int) -> Record:
    return {kind: record[kind][:steps] for kind in ("loss", "norm", "grads", "values")}


def test_the_experiment_can_tell_runs_apart(pool: Pool) -> None:
    """Clipping acts at some steps only; packing, rank and scale change the result: equality elsewhere means much."""
    one = records(pool, "one")
    assert min(one["gpt"]["norm"]) < GPT.optimizer["clip_grad"] < max(one["gpt"]["norm"])
    losses = {variant: one[variant]["loss"][0] for variant in ("gpt", "llama", "packing", "q-v-only", "rslora")}
    assert len({round(loss, 4) for loss in losses.values()}) == len(losses)
    with pytest.raises(Mismatch):
        compare(one["packing"], twin(pool, "micro-batch-2"))


def test_a_is_drawn_from_the_full_fan_in_and_differs_by_layer(pool: Pool) -> None:
    """U(-1/sqrt(in), 1/sqrt(in)) with `in` of the whole matrix; `compare` has it equal on every layout."""
    for layout in ("one", "tp4-sp"):
        born = records(pool, layout)["gpt"]["born"]
        first_rows = []
        for name, value in born.items():
            if name.endswith("lora_B"):
                assert not value.any(), f"{name} does not start at zero"
            else:
                bound = 1 / math.sqrt(value.shape[1])
                assert 0.9 * bound < float(value.abs().max()) <= bound, name
                first_rows.append(tuple(value[0, :4].tolist()))
        assert len(first_rows) == len(set(first_rows)) == 4 * 6


def test_ranks_per_layer_leave_layers_without_adapters(pool: Pool) -> None:
    ranks = {n: v.shape[0] for n, v in records(pool, "one")["ranks-per-layer"]["born"].items() if n.endswith("lora_A")}
    assert {name.removeprefix("decoder.layers.").replace(".adapters.", " ") for name in ranks} == {
        "0.mlp.linear_fc2 fc2.lora_A",
        "1.self_attention.linear_qkv q.lora_A",
        "2.self_attention.linear_qkv q.lora_A",
        "2.self_attention.linear_proj o.lora_A",
        "3.self_attention.linear_qkv q.lora_A",
        "3.self_attention.linear_proj o.lora_A",
    }
    assert sorted(ranks.values()) == [1, 1, 1, 2, 3, 3]


# Scale alpha / r near 1: with the deltas of the other experiments the network is so steep that bf16's error of a
# weight grows to a tenth of a gradient, and a bound of that size would say nothing.
MILD = {family: replace(e, method={**e.method, "alpha": 2}, steps=2) for family, e in (("gpt", GPT), ("llama", LLAMA))}
BF16 = {family: replace(experiment, precision="bf16") for family, experiment in MILD.items()}
_whole: list[Any] = []


@pytest.mark.parametrize("layout", ["tp2", "tp2-sp", "pp2", "vpp2"])
def test_bf16_stays_within_its_own_rounding(pool: Pool, layout: str) -> None:
    """A sharded bf16 run rounds partial sums, so it cannot equal the unsharded one. bf16's distance from fp32 is what
    rounding costs; two runs that each round on their own are sqrt(2) of it apart, and 2 is allowed. A pipeline sums
    nothing across ranks, so there the two must agree as in fp32.
    """
    world, cut, _ = LAYOUTS[layout]
    if not _whole:
        _whole.extend(pool.run(1, train_twins, experiments=[*MILD.values(), *BF16.values()])[0])
    sharded = pool.run(world, train_twins, experiments=[replace(e, layout=cut) for e in BF16.values()])[0]
    for got, exact, whole in zip(sharded, _whole[:2], _whole[2:], strict=True):
        assert got["complaints"] == []
        for step in range(2):
            rounding = frobenius(whole["grads"][step], exact["grads"][step])
            assert 1e-3 < rounding < 0.02, f"bf16 itself is off by {rounding}; one rounding is 2**-9"
            allowed = rounding * (2.0 if "tp" in layout else 1e-3)
            assert frobenius(got["grads"][step], whole["grads"][step]) <= allowed
            assert frobenius(got["values"][step], whole["values"][step]) <= 2**-8  # one rounding of the parameter
            # The mean of some 40 losses near 4.6, each off by about 2^-8 of a logit of size 1.
            assert got["loss"][step] == pytest.approx(whole["loss"][step], abs=2**-8)
            assert got["norm"][step] == pytest.approx(whole["norm"][step], rel=rounding)


@pytest.mark.parametrize(
    ("parallel", "says"),
    [
        ({"tensor": 4}, "num_query_groups"),  # two query groups do not cut over four ranks
        ({"tensor": 8}, "num_attention_heads"),
        ({"pipeline": 3}, "num_layers"),
        ({"pipeline": 2, "virtual_pipeline": 4}, "num_layers"),
        ({"context": 2}, "context"),
    ],
)
def test_a_layout_that_cannot_cut_the_model_is_refused(parallel: dict[str, int], says: str) -> None:
    config = parse_config({"model": LLAMA.model, "parallel": parallel, "data": {"sequence_length": 16}})
    shape = resolve_shape(config.model, tokenizer_vocab_size=100)
    method = choose_method(config.method, num_layers=shape.num_layers)
    with pytest.raises(ConfigError, match=says):
        check(config, shape, method, 24)

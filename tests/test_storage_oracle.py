# SPDX-License-Identifier: Apache-2.0
"""Frozen weights in FP8 and NF4 under every kind of parallelism, against one process with the same storage.

The stored bytes are equal by construction (`tests/layers/test_storage.py`), and NF4 weights multiplied in the training
precision must then give what any layout gives. FP8 products round activations: where a sum over ranks moves a value by
its last bit, a rounding may fall the other way and be off by a sixteenth of that value. So FP8 is held to a fraction of
its own distance from the weights it stands for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lora_megatron.config import parse_config
from lora_megatron.errors import ConfigError
from lora_megatron.layers.storage.choose import StorageFormat
from lora_megatron.methods.choose import choose_method
from lora_megatron.model.checks import check_plan
from lora_megatron.model.presets import resolve_shape
from lora_megatron.parallel.groups import Layout
from tests.comparison import frobenius
from tests.pool import Pool
from tests.twin import Experiment, Record, train_twins

WIDE = {"num_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "ffn_hidden_size": 256}
MODELS: dict[str, dict[str, Any]] = {
    "gpt": {"preset": "tiny", **WIDE},
    "llama": {"preset": "tiny-llama", **WIDE, "num_query_groups": 2},
}
FORMATS = {"fp8": StorageFormat("fp8"), "nf4": StorageFormat("nf4"), "nf4-fp8": StorageFormat("nf4", "fp8")}
LAYOUTS = {
    "tp2": Layout(tensor=2),
    "tp2-sp": Layout(tensor=2, sequence=True),
    "pp2": Layout(pipeline=2),
    "dp2": Layout(),
}
RECOMPUTED: dict[str, dict[str, Any]] = {
    "recompute": {"recompute": "full"},
    "recompute-mlp": {"recompute": "selective", "recompute_modules": ("mlp",), "recompute_layers": 1},
}
# Scale alpha / r near 1, as for bf16: a network steep in its input would magnify every rounding.
MILD = Experiment(steps=2, method={**Experiment().method, "alpha": 2})
CASES = [(model, kind) for model in MODELS for kind in FORMATS]
_records: dict[str, dict[tuple[str, str], Record]] = {}


def records(pool: Pool, layout: str) -> dict[tuple[str, str], Record]:
    """All cases of a layout, run in one world; `one` is the unsharded process, `exact` that with whole weights."""
    if layout not in _records:
        cut = LAYOUTS.get(layout, Layout())
        storage = {kind: None if layout == "exact" else FORMATS[kind] for kind in FORMATS}
        how = RECOMPUTED.get(layout, {})
        experiments = [
            replace(MILD, model=MODELS[model], storage=storage[kind], layout=cut, **how) for model, kind in CASES
        ]
        world = 2 if layout in LAYOUTS else 1
        _records[layout] = dict(zip(CASES, pool.run(world, train_twins, experiments=experiments)[0], strict=True))
    return _records[layout]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("model", "kind"), CASES)
def test_a_layout_changes_nothing_but_roundings(pool: Pool, layout: str, model: str, kind: str) -> None:
    got, whole = records(pool, layout)[model, kind], records(pool, "one")[model, kind]
    exact = records(pool, "exact")[model, kind]
    assert got["complaints"] == []
    assert got["loss"][0] == pytest.approx(whole["loss"][0], rel=1e-5)
    own = frobenius(whole["grads"][0], exact["grads"][0])
    assert own > 0.01, "the storage makes a difference at all"
    for step, share in enumerate((0.1, 0.5)):  # a rounding that fell the other way moves the second step's weights
        allowed = 1e-4 if kind == "nf4" else share * own
        assert frobenius(got["grads"][step], whole["grads"][step]) < allowed
    assert frobenius(got["values"][1], whole["values"][1]) < 1e-3


@pytest.mark.parametrize(("model", "kind"), CASES)
def test_recomputation_changes_nothing_but_roundings(pool: Pool, model: str, kind: str) -> None:
    got, whole = records(pool, "recompute")[model, kind], records(pool, "one")[model, kind]
    assert got["loss"][0] == pytest.approx(whole["loss"][0], rel=1e-6)
    assert frobenius(got["grads"][0], whole["grads"][0]) < (1e-4 if kind == "nf4" else 0.01)


@pytest.mark.parametrize(("model", "kind"), CASES)
def test_a_rebuilt_mlp_changes_nothing(pool: Pool, model: str, kind: str) -> None:
    """Nothing is rounded another way: the same products of the same numbers, a second time."""
    got, whole = records(pool, "recompute-mlp")[model, kind], records(pool, "one")[model, kind]
    assert got["loss"] == whole["loss"]
    for step, gradients in enumerate(whole["grads"]):
        assert frobenius(got["grads"][step], gradients) == 0.0


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"base": {"storage": "fp8"}, "method": {"name": "full"}}, "method.name = full"),
        ({"base": {"storage": "bf16"}}, "train.precision = fp32"),
        ({"base": {"storage": "fp8", "gemm": "fp8"}}, "base.gemm"),
        ({"base": {"fast_accum": "both"}}, "base.fast_accum = both"),
        ({"base": {"storage": "nf4", "fast_accum": "none"}}, "base.gemm=fp8"),
        ({"base": {"storage": "nf4"}, "parallel": {"tensor": 4}}, "blocks of 64"),
    ],
)
def test_a_storage_that_cannot_be_is_refused(tree: dict[str, Any], says: str) -> None:
    config = parse_config({"model": {**MODELS["gpt"], "vocab_size": 100}, "data": {"sequence_length": 16}, **tree})
    shape = resolve_shape(config.model, tokenizer_vocab_size=100)
    with pytest.raises(ConfigError, match=says):
        check_plan(config, shape, choose_method(config.method, num_layers=shape.num_layers), 4)

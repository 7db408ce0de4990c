# SPDX-License-Identifier: Apache-2.0
"""An output layer in FP8 under every kind of parallelism, against one process with the same: training, held-out loss,
decoding. Its codes are equal by construction; where a sum over ranks moves a hidden state by its last bit, a value
between two codes may fall the other way, so gradients are held to a fraction of their distance from those without FP8.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from lora_megatron.config import Config, parse_config
from lora_megatron.errors import ConfigError
from lora_megatron.evaluation.decoder import decoding
from lora_megatron.layers.output_layer import StoredOutputLayer
from lora_megatron.layers.storage.choose import StorageFormat
from lora_megatron.layers.storage.fp8 import StoredFp8, scale_of, to_fp8
from lora_megatron.layers.storage.stored import stored_of, writable
from lora_megatron.measure.memory import weight_bytes
from lora_megatron.methods.choose import choose_method
from lora_megatron.model.checks import check_plan, options_of
from lora_megatron.model.names import EMBEDDING, OUTPUT, named_parameters
from lora_megatron.model.presets import resolve_shape
from lora_megatron.parallel.groups import Layout, build_mesh
from tests.comparison import frobenius
from tests.pool import Pool
from tests.twin import VOCABULARY, Experiment, Record, build_chunks, train_twins

FP8 = StorageFormat("fp8", transposes=0)
WIDE = {"num_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "ffn_hidden_size": 256}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"preset": "tiny", **WIDE, "tied_embeddings": True},
    "untied": {"preset": "tiny-llama", **WIDE, "num_query_groups": 2, "tied_embeddings": False},
}
LAYOUTS = {
    "tp2": Layout(tensor=2),
    "tp2-sp": Layout(tensor=2, sequence=True),
    "pp2": Layout(pipeline=2),
    "pp2-chunks": Layout(pipeline=2, virtual_pipeline=2),
    "dp2": Layout(),
}
# Scale alpha / r near 1: a network steep in its input would magnify every rounding.
MILD = Experiment(steps=2, method={**Experiment().method, "alpha": 2}, head=FP8)
SMOOTHED = {"plain": 0.0, "smoothed": 0.1}
CASES = [(model, smoothing) for model in MODELS for smoothing in SMOOTHED]
_records: dict[str, dict[tuple[str, str], Record]] = {}


def experiment(model: str, layout: str, smoothing: str = "plain") -> Experiment:
    shape = MODELS[model] | ({"num_layers": 4} if layout.endswith("chunks") else {})
    cut = LAYOUTS.get(layout, Layout())
    head = None if layout.startswith("exact") else FP8
    return replace(MILD, model=shape, layout=cut, head=head, label_smoothing=SMOOTHED[smoothing])


def records(pool: Pool, layout: str) -> dict[tuple[str, str], Record]:
    """All cases of a layout, run in one world; `one` is the unsharded process, `exact` that without FP8."""
    if layout not in _records:
        world = 2 if layout in LAYOUTS else 1
        found = pool.run(world, train_twins, experiments=[experiment(model, layout, how) for model, how in CASES])
        _records[layout] = dict(zip(CASES, found[0], strict=True))
    return _records[layout]


SLOW = {"pp2-chunks": pytest.mark.slow}
EVERY = [pytest.param(name, marks=SLOW.get(name, ())) for name in LAYOUTS]


@pytest.mark.parametrize("layout", EVERY)
@pytest.mark.parametrize(("model", "smoothing"), CASES)
def test_a_layout_changes_nothing_but_roundings(pool: Pool, layout: str, model: str, smoothing: str) -> None:
    of = (model, smoothing)
    deep = "-chunks" if layout.endswith("chunks") else ""
    got, whole, exact = (records(pool, name)[of] for name in (layout, f"one{deep}", f"exact{deep}"))
    assert got["complaints"] == []
    assert got["eval"] == pytest.approx(whole["eval"], rel=1e-5)
    assert got["loss"][0] == pytest.approx(whole["loss"][0], rel=1e-5)
    assert 0 < abs(whole["loss"][0] / exact["loss"][0] - 1) < 5e-3
    own = frobenius(whole["grads"][0], exact["grads"][0])
    assert 0.005 < own < 0.06, "FP8 makes a difference, and of its size"
    for step, share in enumerate((0.1, 0.5)):  # a rounding that fell the other way moves the second step's weights
        assert frobenius(got["grads"][step], whole["grads"][step]) < share * own
    assert frobenius(got["values"][1], whole["values"][1]) < 1e-3


def test_held_out_loss_is_that_of_the_trained_model(pool: Pool) -> None:
    """At the values it was born with, the first step's batch has the loss in evaluation that it has in training."""
    for model in MODELS:
        record = records(pool, "one")[model, "plain"]
        assert record["eval"] == pytest.approx(record["loss"][0], rel=1e-6)
        assert abs(record["eval"] / records(pool, "exact")[model, "plain"]["eval"] - 1) > 1e-6


class Decoded(NamedTuple):
    logits: Tensor
    """[b, vocabulary], of what follows the prompts and one token more; equal on all ranks."""
    every_position: Tensor | None
    """[b, s, vocabulary] of a pass without labels; None with pipeline stages."""
    head: tuple[Tensor, Tensor] | None
    """Codes, as bytes, and scales of this rank's rows; None but on the last stage."""
    is_without_bytes: dict[str, bool]
    """Of each parameter with vocabulary rows on this rank."""


def decode(model: str, layout: str) -> Decoded:
    what = experiment(model, layout)
    if not mpu.is_initialized():
        build_mesh(what.layout, seed=1, timeout_minutes=2)
    chunks, _ = build_chunks(what)
    with decoding(chunks, vocab_size=VOCABULARY) as decoder:
        first = decoder.start([[1, 2, 3], [4, 5]], Tensor.double, (2, VOCABULARY))
        second = decoder.advance([6, 7], Tensor.double, (2, VOCABULARY))
    every = None
    if what.layout.pipeline == 1:
        tokens, positions = torch.arange(8).view(2, 4), torch.arange(4).expand(2, 4)
        with torch.no_grad():
            parts = gather_from_tensor_model_parallel_region(chunks[0](tokens, positions, None))
        every = parts[..., :VOCABULARY]
    heads = [chunk.output_layer.stored for chunk in chunks if chunk.post_process]
    rows = {
        n.name: stored_of(n.parameter) is not None for n in named_parameters(chunks) if n.name in (EMBEDDING, OUTPUT)
    }
    found = (heads[0].codes.view(torch.uint8), heads[0].scale) if heads else None
    return Decoded(torch.cat([first, second]), every, found, rows)


def off(got: Tensor, want: Tensor | None) -> float:
    assert want is not None
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("layout", ["tp2", "tp2-sp", "pp2"])
@pytest.mark.parametrize("model", MODELS)
def test_decoding_takes_the_same_logits_on_every_layout(pool: Pool, model: str, layout: str) -> None:
    (whole,) = pool.run(1, decode, model=model, layout="one")
    found = pool.run(2, decode, model=model, layout=layout)
    for one in found:
        assert off(one.logits, whole.logits) < 2e-3  # where a value fell between two codes the other way
        assert one.every_position is None or off(one.every_position, whole.every_position) < 2e-3
    heads = [one.head for one in found if one.head is not None]
    for part, want in zip(zip(*heads, strict=True), whole.head or (), strict=True):
        assert torch.equal(torch.cat(part), want), "a shard is quantised as its part of the whole"


def test_a_weight_of_the_head_alone_has_no_other_bytes(pool: Pool) -> None:
    assert pool.run(1, decode, model="tied", layout="one")[0].is_without_bytes == {EMBEDDING: False}
    assert pool.run(1, decode, model="untied", layout="one")[0].is_without_bytes == {EMBEDDING: False, OUTPUT: True}
    first, last = pool.run(2, decode, model="tied", layout="pp2")
    assert (first.is_without_bytes, last.is_without_bytes) == ({EMBEDDING: False}, {EMBEDDING: True})


def of_new_weights(model: str) -> list[tuple[Tensor, Tensor]]:
    """(codes of the head, of what was written) after each of two loads; and the head's use between them."""
    what = experiment(model, "one")
    if not mpu.is_initialized():
        build_mesh(what.layout, seed=1, timeout_minutes=2)
    (chunk,), _ = build_chunks(what)
    layer, found = chunk.output_layer, []
    name = EMBEDDING if model == "tied" else OUTPUT
    (parameter,) = (n.parameter for n in named_parameters([chunk]) if n.name == name)
    assert isinstance(layer, StoredOutputLayer)
    bytes_before = weight_bytes([chunk])
    for factor in (1.0, -3.0):
        values = factor * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
        with torch.no_grad(), writable(parameter) as target:
            target.copy_(values)
        turned = layer.stored.transposed_codes().view(torch.uint8).t()
        want = to_fp8(values, scale_of(values.abs().amax(1, keepdim=True))).view(torch.uint8)
        found += [(layer.stored.codes.view(torch.uint8), want), (turned, want)]
    assert weight_bytes([chunk]) == bytes_before
    return [(got.clone(), want) for got, want in found[2:]]


@pytest.mark.parametrize("model", MODELS)
def test_weights_that_are_loaded_are_those_of_the_head(pool: Pool, model: str) -> None:
    (found,) = pool.run(1, of_new_weights, model=model)
    for got, want in found:
        assert torch.equal(got, want)


def train_without_the_labels_column(what: Experiment) -> Record | None:
    with mock.patch.object(StoredFp8, "rows", lambda self, index: torch.zeros(len(index), self.shape[1])):
        return train_twins([what])[0]


def test_the_comparison_notices_a_label_left_out(pool: Pool) -> None:
    got = pool.run(1, train_without_the_labels_column, what=experiment("tied", "one"))[0]
    exact = records(pool, "exact")["tied", "plain"]
    assert frobenius(got["grads"][0], exact["grads"][0]) > 0.06


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        (
            {"base": {"head": "fp8"}, "method": {"name": "full"}},
            "base.head = fp8 is of a frozen output layer, and method.name = full trains "
            "embedding.word_embeddings.weight: drop it",
        ),
        ({"base": {"head": "bf16"}}, "base.head = bf16 is not train.precision = fp32"),
        ({"base": {"head": "fp8", "transposes": "kept"}}, "base.transposes = kept is about FP8 linear layers"),
        ({"base": {"head": "bf16", "fast_accum": "both"}, "train": {"precision": "bf16"}}, "base.fast_accum = both"),
    ],
)
def test_a_head_that_cannot_be_is_refused(tree: dict[str, Any], says: str) -> None:
    config = configuration(tree)
    shape = resolve_shape(config.model, tokenizer_vocab_size=VOCABULARY)
    with pytest.raises(ConfigError, match=says):
        check_plan(config, shape, choose_method(config.method, num_layers=shape.num_layers), 1)


def configuration(tree: dict[str, Any]) -> Config:
    model = {**MODELS["tied"], "vocab_size": VOCABULARY}
    return parse_config({"model": model, "data": {"sequence_length": 16}, **tree})


@pytest.mark.parametrize("method", ["lora", "bitfit", "ft_top2"])
def test_from_a_configuration(method: str) -> None:
    config = configuration({"base": {"head": "fp8", "fast_accum": "both"}, "method": {"name": method}})
    shape = resolve_shape(config.model, tokenizer_vocab_size=VOCABULARY)
    check_plan(config, shape, choose_method(config.method, num_layers=shape.num_layers), 1)
    assert options_of(config).head == StorageFormat("fp8", fast_accum="both", transposes=0)
    assert options_of(config).storage is None
    base = config.base.of_training_precision()
    assert options_of(config.model_copy(update={"base": base})).head is None

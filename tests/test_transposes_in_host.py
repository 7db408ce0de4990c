# SPDX-License-Identifier: Apache-2.0
"""`base.transposes=host` trains to the bit as `anew`, turning fewer weights round; its bytes are planned.

python -m pytest tests/test_transposes_in_host.py -m "multigpu or not multigpu"
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import pytest
from torch import Tensor

from lora_megatron.config import BaseSection, Config, parse_config
from lora_megatron.errors import ConfigError
from lora_megatron.layers.storage.choose import StorageFormat
from lora_megatron.layers.storage.fp8 import Fp8Products, StoredFp8
from lora_megatron.layers.storage.host_transposes import HostTransposes, places
from lora_megatron.methods.choose import choose_method
from lora_megatron.model.checks import check_plan, layout_of
from lora_megatron.model.presets import resolve_shape
from lora_megatron.model.storage import storage_of
from lora_megatron.parallel.groups import Layout
from lora_megatron.planning.memory import build_rank, this_place
from lora_megatron.planning.stages import microbatch_of, names_read_backward
from lora_megatron.planning.transposes import host_bytes, unpacked_bytes
from lora_megatron.planning.weights import Weight
from tests.gpus import two_gpus
from tests.pool import Pool
from tests.twin import VOCABULARY, Experiment, Record, train_twin

WIDE = {"preset": "tiny", "num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "ffn_hidden_size": 256}
LLAMA = {**WIDE, "preset": "tiny-llama", "num_query_groups": 2}


class Trained(NamedTuple):
    record: Record | None
    turned: int
    """Weights turned round on this rank, in all steps."""


def train(experiment: Experiment) -> Trained:
    turned = 0
    original = StoredFp8.fp8_codes

    def counting(self: StoredFp8, *, transposed: bool) -> Tensor:
        nonlocal turned
        turned += transposed
        return original(self, transposed=transposed)

    with mock.patch.object(StoredFp8, "fp8_codes", counting):
        return Trained(train_twin(experiment), turned)


LAYOUTS = {
    "one": Layout(),
    "tp2-sp": Layout(tensor=2, sequence=True),
    "pp2": Layout(pipeline=2),
    "pp2-vp2": Layout(pipeline=2, virtual_pipeline=2),
}


def check_training(pool: Pool, layout: Layout, model: dict[str, Any], **how: Any) -> None:
    targets = {"q": 4, "v": 2, "o": 3, **({"up": 2} if model is LLAMA else {"fc1": 2, "fc2": 5})}
    uses = layout.pipeline if layout.virtual_pipeline > 1 else 1
    storage = StorageFormat("fp8", transposes=uses)
    plain = Experiment(model=model, layout=layout, method={"targets": targets}, storage=storage, steps=2, **how)
    (anew, *_), (host, *_) = (
        pool.run(layout.model_size, train, experiment=replace(plain, transposes_in_host=in_host))
        for in_host in (False, True)
    )
    assert anew.record is not None
    assert host.record is not None
    assert host.record["loss"] == anew.record["loss"]
    for what in ("grads", "values"):
        for got, want in zip(host.record[what], anew.record[what], strict=True):
            assert [key for key in want if not got[key].equal(want[key])] == []
    layers, microbatches = 4 // layout.pipeline, 8 // uses
    attention = microbatches * (2 * layers - 1)  # qkv of the first layer has no backward product
    assert anew.turned == microbatches * 2 * layers + attention
    if 2 * layers <= places(2):
        assert host.turned == 2 * layers + attention
    else:  # the first pass turns all of them, further ones every second (`tests.layers.test_host_transposes`)
        assert 2 * layers + attention < host.turned <= (2 + microbatches - 1) * layers + attention


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("model", [WIDE, LLAMA], ids=["gpt", "llama"])
def test_training_is_the_same_to_the_bit(pool: Pool, name: str, model: dict[str, Any]) -> None:
    check_training(pool, LAYOUTS[name], model)


@pytest.mark.parametrize("name", [pytest.param("pp2-vp2", marks=two_gpus)])
def test_training_is_the_same_on_gpus(nccl: Pool, name: str) -> None:
    check_training(nccl, LAYOUTS[name], WIDE, precision="bf16")


def config_of(**tree: Any) -> Config:
    return parse_config({"model": {**WIDE, "vocab_size": 100}, "data": {"sequence_length": 16}, **tree})


@pytest.mark.parametrize(
    ("tree", "refusal"),
    [
        ({"base": {"transposes": "host"}}, "base.transposes = host is about FP8 linear layers: set base.storage=fp8"),
        (
            {"base": {"storage": "fp8", "transposes": "host"}, "train": {"cuda_graph": True}},
            "train.cuda_graph = true with base.transposes = host: .* set base.transposes=anew or kept",
        ),
    ],
)
def test_refused(tree: dict[str, Any], refusal: str) -> None:
    config = config_of(**tree)
    shape = resolve_shape(config.model, tokenizer_vocab_size=VOCABULARY)
    method = choose_method(config.method, num_layers=shape.num_layers)
    with pytest.raises(ConfigError, match=refusal):
        check_plan(config, shape, method, 1)


class Bytes(NamedTuple):
    on_host: int
    planned_on_host: int
    on_gpu: int
    """For what comes from the host."""
    planned: int
    """Of all that stored weights' products read."""


def held_and_planned(trees: list[dict[str, Any]]) -> list[Bytes]:
    return [_held_and_planned(config_of(**tree)) for tree in trees]


def _held_and_planned(config: Config) -> Bytes:
    hosts = set[HostTransposes]()
    original = Fp8Products.transposed_codes

    def noting(self: Fp8Products) -> Tensor:
        if self.host is not None:
            hosts.add(self.host)
        return original(self)

    experiment = Experiment(
        layout=layout_of(config),
        model=WIDE,
        method=config.method.model_dump(),
        storage=storage_of(config),
        transposes_kept=config.base.transposes_kept or 0,
        transposes_in_host=True,
        precision="bf16",
        steps=2,
    )
    with mock.patch.object(Fp8Products, "transposed_codes", noting):
        train_twin(experiment)
    shape = resolve_shape(config.model, tokenizer_vocab_size=VOCABULARY)
    method = choose_method(config.method, num_layers=shape.num_layers)
    names = names_read_backward(method, microbatch_of(config, shape), this_place().stage)
    weights = build_rank(config, shape, method)
    (host,) = hosts
    rooms = [slot.room for slot in host._slots if slot.room is not None]
    return Bytes(
        sum(copy.nbytes for copy in host._copies),
        host_bytes(weights, config.base, read_backward=names),
        sum(room.nbytes for room in rooms),
        unpacked_bytes(weights, config.base, read_backward=names),
    )


MLP, QKV, PROJ = 128 * 256, 128 * 384, 128 * 128


@pytest.mark.parametrize("parallel", [{}, {"pipeline": 2, "virtual_pipeline": 2}], ids=["one stage", "interleaved"])
def test_what_is_planned_is_what_is_held(pool: Pool, parallel: dict[str, Any]) -> None:
    base = {"storage": "fp8", "transposes": "host"}
    trees: list[dict[str, Any]] = [
        {"base": {**base, **kept}, "parallel": parallel, "train": {"precision": "bf16"}}
        for kept in ({}, {"transposes_kept": 1})
    ]
    world = parallel.get("pipeline", 1)
    for rank, found in enumerate(pool.run(world, held_and_planned, trees=trees)):
        for kept, one in zip((0, 1), found, strict=True):
            weights = 2 * (4 // world - kept)
            assert one.on_host == one.planned_on_host == weights * MLP
            assert one.on_gpu == min(weights, places(2)) * MLP
            lasting = kept * (QKV + PROJ + 2 * MLP)
            first_alone = rank == 0 and kept  # qkv of the first layer has no backward product
            group = (PROJ + (0 if first_alone else QKV)) if parallel else 0
            assert one.planned == lasting + one.on_gpu + group + QKV


def test_no_host_is_planned_without_the_option() -> None:
    weight = Weight("decoder.layers.0.mlp.linear_fc1.weight", (8, 4), 2, trained=False)
    for transposes, size in ((None, 0), ("group", 0), ("kept", 0), ("host", 32)):
        base = BaseSection(storage="fp8", transposes=transposes)  # type: ignore[arg-type]  # a str here
        assert host_bytes([weight], base, read_backward={weight.name}) == size

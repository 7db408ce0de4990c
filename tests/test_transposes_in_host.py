# SPDX-License-Identifier: Apache-2.0
"""`base.transposes=host` trains to the bit as `anew`, turning fewer weights round; its bytes are planned.

python -m pytest tests/test_transposes_in_host.py -m "multigpu or not multigpu"
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
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
from lora_megatron.model.transposes import keep_transposes, weights_ahead
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
CHUNKS = Layout(pipeline=2, virtual_pipeline=4)
"""Of one layer each with 8 layers, of two with 16: a rank has four chunks, and room on the GPU for two."""


def check_training(pool: Pool, layout: Layout, model: dict[str, Any], **how: Any) -> None:
    """Of 2 steps of 4 microbatches each, or what else `how` says."""
    targets = {"q": 4, "v": 2, "o": 3, **({"up": 2} if model is LLAMA else {"fc1": 2, "fc2": 5})}
    uses = layout.pipeline if layout.virtual_pipeline > 1 else 1
    storage = StorageFormat("fp8", transposes=uses)
    how = {"steps": 2, **how}
    plain = Experiment(model=model, layout=layout, method={"targets": targets}, storage=storage, **how)
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
    layers, groups = model["num_layers"] // layout.pipeline, 4 * how["steps"] // uses
    attention = groups * (2 * layers - 1)  # qkv of the first layer has no backward product
    assert anew.turned == groups * 2 * layers + attention
    if 2 * layers <= places(weights_ahead([2 * layers // layout.virtual_pipeline], several=uses > 1)):
        assert host.turned == 2 * layers + attention, "there is room for all"
    else:  # the first pass turns all of them, further ones at most every second (`tests.layers.test_host_transposes`)
        assert 2 * layers + attention < host.turned <= (2 + groups - 1) * layers + attention


@pytest.mark.parametrize(
    ("name", "model"),
    [*((name, WIDE) for name in LAYOUTS), ("one", LLAMA), ("pp2-vp2", LLAMA)],
    ids=lambda value: value if isinstance(value, str) else value["preset"],
)
def test_training_is_the_same_to_the_bit(pool: Pool, name: str, model: dict[str, Any]) -> None:
    check_training(pool, LAYOUTS[name], model)


@pytest.mark.parametrize(("layers", "steps"), [(8, 2), (16, 1)])
def test_training_in_more_chunks_than_there_is_room_for(pool: Pool, layers: int, steps: int) -> None:
    check_training(pool, CHUNKS, {**WIDE, "num_layers": layers}, steps=steps)


@pytest.mark.parametrize("layers", [pytest.param(layers, marks=two_gpus) for layers in (8, 16)])
def test_training_is_the_same_on_gpus(nccl: Pool, layers: int) -> None:
    check_training(nccl, CHUNKS, {**WIDE, "num_layers": layers}, precision="bf16")


@pytest.mark.parametrize(
    ("layers", "chunks", "last", "expected"),
    [(2, 4, 0, 4), (2, 4, 1, 4), (1, 4, 0, 2), (2, 1, 0, 2), (2, 4, 8, None)],
)
def test_so_many_are_brought_ahead(layers: int, chunks: int, last: int, expected: int | None) -> None:
    """As a chunk's MLPs have, where a group reads it; of each weight that has FP8 products forward passes are told."""

    def layer() -> torch.nn.Module:
        parts = {"self_attention": ["linear_qkv", "linear_proj"], "mlp": ["linear_fc1", "linear_fc2"]}
        return torch.nn.ModuleDict(
            {part: torch.nn.ModuleDict({n: stored() for n in names}) for part, names in parts.items()}
        )

    def stored() -> StoredFp8:
        one = StoredFp8(16, 16, device=torch.device("cpu"), axis=0, group=None)
        one.transposes = 2 if chunks > 1 else 1
        return one

    made = [SimpleNamespace(decoder=SimpleNamespace(layers=[layer() for _ in range(layers)])) for _ in range(chunks)]
    keep_transposes(made, last=last, in_host=True)  # type: ignore[arg-type]  # it asks for layers alone
    named = [
        (name, one)
        for chunk in made
        for layer in chunk.decoder.layers
        for name, one in layer.named_modules()
        if isinstance(one, StoredFp8)
    ]
    hosts = {one.told for _, one in named}
    assert len(hosts) == 1
    (host,) = hosts
    assert (None if host is None else len(host._slots)) == (None if expected is None else places(expected))
    others = 4 * (layers * chunks - last)
    for name, one in named[:others]:
        assert (one.host is host) == name.startswith("mlp.")
    assert all(one.host is None and one.transposes == 0 for _, one in named[others:])


def config_of(**tree: Any) -> Config:
    model = {**WIDE, "vocab_size": 100}
    return parse_config({"model": model, "data": {"sequence_length": 16, "global_batch_size": 4}, **tree})


@pytest.mark.parametrize(
    ("tree", "refusal"),
    [
        ({"base": {"transposes": "host"}}, "base.transposes = host is about FP8 linear layers: set base.storage=fp8"),
        ({"base": {"storage": "nf4", "transposes": "host"}}, "base.transposes = host is about FP8 linear layers: set"),
        (
            {"base": {"storage": "fp8", "transposes": "host"}, "method": {"name": "full"}},
            "base.storage = fp8 keeps frozen weights, and method.name = full freezes none: drop it",
        ),
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
    most: int
    """With that, of what is turned round at any time."""
    planned: int


def held_and_planned(trees: list[dict[str, Any]]) -> list[Bytes]:
    return [_held_and_planned(config_of(**tree)) for tree in trees]


def _held_and_planned(config: Config) -> Bytes:
    hosts = set[HostTransposes]()
    own, most, original = set[Fp8Products](), 0, Fp8Products.transposed_codes

    def noting(self: Fp8Products) -> Tensor:
        nonlocal most
        before = [slot.place for slot in self.host._slots] if self.host is not None else []
        codes = original(self)
        if self.host is None:
            own.add(self)
        else:
            hosts.add(self.host)
        rooms = sum(slot.room.nbytes for host in hosts for slot in host._slots)
        lasting = sum(one._transposed.numel() for one in own if one._transposed is not None)
        was_turned = self._transposed is None and (self.host is None or self.host._places[id(self)] not in before)
        most = max(most, rooms + lasting + (codes.numel() if was_turned else 0))
        return codes

    experiment = Experiment(
        layout=layout_of(config),
        model={key: value for key, value in config.model.model_dump().items() if key in WIDE},
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
    return Bytes(
        sum(copy.nbytes for copy in host._copies),
        host_bytes(weights, config.base, read_backward=names),
        sum(slot.room.nbytes for slot in host._slots),
        most,
        unpacked_bytes(weights, config.base, read_backward=names),
    )


MLP, QKV, PROJ = 128 * 256, 128 * 384, 128 * 128


@pytest.mark.parametrize(
    ("parallel", "layers"),
    [({}, 4), ({"pipeline": 2, "virtual_pipeline": 2}, 4), ({"pipeline": 2, "virtual_pipeline": 4}, 16)],
    ids=["one stage", "interleaved", "more chunks than there is room for"],
)
def test_what_is_planned_is_what_is_held(pool: Pool, parallel: dict[str, Any], layers: int) -> None:
    """The plan has a weight that is turned round beside all that is kept, which need not be at the same time."""
    base = {"storage": "fp8", "transposes": "host"}
    model = {**WIDE, "vocab_size": 100, "num_layers": layers}
    trees: list[dict[str, Any]] = [
        {"model": model, "base": {**base, **kept}, "parallel": parallel, "train": {"precision": "bf16"}}
        for kept in ({}, {"transposes_kept": 1})
    ]
    world, chunks = parallel.get("pipeline", 1), parallel.get("virtual_pipeline", 1)
    for found in pool.run(world, held_and_planned, trees=trees):
        for kept, one in zip((0, 1), found, strict=True):
            weights = 2 * (layers // world - kept)
            ahead = weights_ahead([2 * layers // world // chunks], several=chunks > 1)
            assert one.on_host == one.planned_on_host == weights * MLP
            assert one.on_gpu == min(weights, places(ahead)) * MLP
            assert one.most <= one.planned <= one.most + QKV


def test_no_host_is_planned_without_the_option() -> None:
    weight = Weight("decoder.layers.0.mlp.linear_fc1.weight", (8, 4), 2, trained=False)
    for transposes, size in ((None, 0), ("group", 0), ("kept", 0), ("host", 32)):
        base = BaseSection.model_validate({"storage": "fp8", "transposes": transposes})
        assert host_bytes([weight], base, read_backward={weight.name}) == size

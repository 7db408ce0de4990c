# SPDX-License-Identifier: Apache-2.0
"""`base.transposes`: weights turned round once for several microbatches give what those turned round anew give."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from lora_megatron.config import BaseSection, Config, parse_config
from lora_megatron.errors import ConfigError
from lora_megatron.layers.storage.choose import StorageFormat
from lora_megatron.layers.storage.fp8 import Fp8Products, StoredFp8
from lora_megatron.layers.storage.nf4 import StoredNf4ForFp8
from lora_megatron.methods.choose import choose_method
from lora_megatron.model.checks import layout_of
from lora_megatron.model.presets import resolve_shape
from lora_megatron.model.storage import storage_of
from lora_megatron.model.transposes import keep_transposes
from lora_megatron.parallel.groups import Layout
from lora_megatron.planning.memory import build_rank, this_place
from lora_megatron.planning.stages import microbatch_of, names_read_backward
from lora_megatron.planning.transposes import unpacked_bytes
from lora_megatron.planning.weights import Weight
from tests.pool import Pool
from tests.twin import VOCABULARY, Experiment, Record, train_twin

WIDE = {"preset": "tiny", "num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "ffn_hidden_size": 256}
DEEP = {**WIDE, "num_layers": 8}
INTERLEAVED = Layout(pipeline=2, virtual_pipeline=2)
GROUPS = Experiment(model=WIDE, layout=INTERLEAVED, steps=2, global_batch_size=4)
LAYERS_OF_A_RANK, LINEARS = 2, 4
KINDS = {"fp8": StorageFormat("fp8"), "nf4-fp8": StorageFormat("nf4", "fp8")}


class Counted(NamedTuple):
    record: Record | None
    made: int
    """Weights turned round, in all steps."""
    together: int
    """Most of them that were kept at any time."""
    left: int
    """Kept at the end."""


def kept() -> list[Fp8Products]:
    return [one for one in gc.get_objects() if isinstance(one, Fp8Products) and one._transposed is not None]


def train_counting(experiment: Experiment) -> Counted:
    """On this rank."""
    gc.collect()
    before = set(map(id, kept()))
    made, together = 0, 0
    original = Fp8Products.transposed_codes

    def counting(self: Fp8Products) -> torch.Tensor:
        nonlocal made, together
        made += self._transposed is None
        codes = original(self)
        own.add(self)
        together = max(together, sum(one._transposed is not None for one in own))
        return codes

    own: set[Any] = set()
    with mock.patch.object(Fp8Products, "transposed_codes", counting):
        record = train_twin(experiment)
        left = sum(id(one) not in before for one in kept())
    return Counted(record, made, together, left)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_of_microbatches_reads_what_was_turned_round_once(pool: Pool, kind: str) -> None:
    """2 steps of 4 microbatches in groups of 2, 2 layers of 4 weights on each rank, of which the first layer's qkv has
    no backward product; a chunk, which is one layer, at a time."""
    results = {
        uses: pool.run(2, train_counting, experiment=replace(GROUPS, storage=replace(KINDS[kind], transposes=uses)))
        for uses in (1, 2, 0)
    }
    for rank in range(2):
        weights = LAYERS_OF_A_RANK * LINEARS - (rank == 0)
        counts = {uses: found[rank][1:] for uses, found in results.items()}
        assert counts == {1: (8 * weights, 0, 0), 2: (4 * weights, LINEARS, 0), 0: (weights, weights, weights)}
    anew = results[1][0].record
    assert anew is not None
    for uses in (2, 0):
        record = results[uses][0].record
        assert record is not None
        assert record["loss"] == anew["loss"]
        for what in ("grads", "values"):
            for got, want in zip(record[what], anew[what], strict=True):
                assert [name for name in want if not torch.equal(got[name], want[name])] == []


def test_the_last_layers_of_a_stage_keep_theirs(pool: Pool) -> None:
    """Of the two of each rank the second, and of the other what a group reads."""
    groups = replace(GROUPS, storage=replace(KINDS["fp8"], transposes=2))
    plain, kept_one = (pool.run(2, train_counting, experiment=replace(groups, transposes_kept=n)) for n in (0, 1))
    for rank in range(2):
        others = LINEARS - (rank == 0)
        assert kept_one[rank][1:] == (4 * others + LINEARS, LINEARS + others, LINEARS)
    got, want = kept_one[0].record, plain[0].record
    assert got is not None
    assert want is not None
    assert got["norm"] == want["norm"]


def test_layers_without_fp8_products_are_not_counted() -> None:
    """As those that are fully trained above frozen ones."""

    def stored() -> torch.nn.ModuleList:
        return torch.nn.ModuleList(StoredFp8(16, 16, device=torch.device("cpu"), axis=0, group=None) for _ in range(2))

    layers = [stored(), torch.nn.Linear(4, 4), stored(), torch.nn.Linear(4, 4)]
    chunks = [SimpleNamespace(decoder=SimpleNamespace(layers=part)) for part in (layers[:3], layers[3:])]
    for count, expected in ((0, [1, 1]), (1, [1, 0]), (2, [0, 0])):
        keep_transposes(chunks, last=count, in_host=False)  # type: ignore[arg-type]  # it asks for layers alone
        found = [{one.transposes for one in layer} for layer in (layers[0], layers[2])]  # type: ignore[union-attr]
        assert found == [{uses} for uses in expected]


@pytest.mark.parametrize("make", [StoredFp8, StoredNf4ForFp8])
def test_new_weights_are_turned_round_again(make: type[Fp8Products]) -> None:
    stored = make(64, 128, device=torch.device("cpu"), axis=0, group=None)
    stored.transposes = 0
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(64, 128, generator=generator) for _ in range(2))
    grad = torch.randn(3, 64, generator=generator)
    stored.store(first)
    before = stored.input_gradient(grad)
    assert torch.equal(stored.input_gradient(grad), before)
    stored.store(second)
    after = stored.input_gradient(grad)
    assert float((after - grad @ second).norm() / (grad @ second).norm()) < 0.2
    assert not torch.equal(after, before)


def test_from_a_configuration() -> None:
    tree = {
        "model": {**WIDE, "vocab_size": 100},
        "data": {"sequence_length": 16, "global_batch_size": 4},
        "base": {"storage": "fp8", "transposes": "group"},
    }
    interleaved = parse_config({**tree, "parallel": {"pipeline": 2, "virtual_pipeline": 2}})
    format_of = storage_of(interleaved)
    assert format_of is not None
    assert format_of.transposes == 2
    plain = parse_config({**tree, "parallel": {"pipeline": 2}})
    format_of = storage_of(plain)
    assert format_of is not None
    assert format_of.transposes == 1
    for base in ({"transposes": "group"}, {"transposes": "group", "head": "fp8"}):
        with pytest.raises(ConfigError, match=r"= group is about FP8 linear layers: set base.storage=fp8"):
            storage_of(parse_config({**tree, "base": base}))
    with pytest.raises(ConfigError, match=r"= both is about FP8 products: set base.storage=fp8, .*, base.head=fp8"):
        storage_of(parse_config({**tree, "base": {"fast_accum": "both"}}))


def test_the_plan_counts_a_chunk_or_all() -> None:
    weights = [
        Weight("decoder.layers.0.mlp.linear_fc1.weight", (8, 4), 2, trained=False, chunk=0),
        Weight("decoder.layers.1.mlp.linear_fc1.weight", (8, 4), 2, trained=False, chunk=1),
        Weight("decoder.layers.1.mlp.linear_fc2.weight", (4, 8), 2, trained=False, chunk=1),
        Weight("output_layer.weight", (100, 4), 2, trained=False, chunk=1),
    ]

    def planned(**base: Any) -> int:
        return unpacked_bytes(weights, BaseSection(**base), read_backward={weight.name for weight in weights})

    ways: tuple[Any, ...] = (None, "anew", "group", "kept")
    assert [planned(storage="fp8", transposes=how) for how in ways] == [32, 32, 64, 96]
    assert [planned(storage="nf4", gemm="fp8", transposes=how) for how in ways] == [32, 32, 64 + 32, 96 + 32]
    assert [planned(storage="nf4"), planned()] == [64, 0]
    ways = tuple({"transposes": how, "transposes_kept": 1} for how in (None, "group", "kept"))  # layer 1's
    assert [planned(storage="fp8", **how) for how in ways] == [64 + 32, 64 + 32, 64 + 32]
    assert [planned(storage="nf4", gemm="fp8", **how) for how in ways] == [64 + 32, 64 + 64, 64 + 64]
    assert [planned(storage="fp8", transposes_kept=n) for n in (2, 9)] == [96, 96], "all, and more than there are"
    assert planned(storage="nf4", gemm="fp8", transposes_kept=9) == 96 + 32, "unpacked beside it"
    assert planned(storage="fp8", transposes="kept", transposes_kept=1) == 96, "all are, in two ways"
    del weights[0]
    assert planned(storage="fp8", transposes="group") == 32, "no interleaved schedule, no group"


def turned_and_planned(cases: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[tuple[int, int]]:
    """Most bytes of weights turned round at any time of a step, and the plan's, of this rank. Each case: what the
    configuration says beside the model, and the same for `Experiment`."""
    return [_turned_and_planned(parse_config({"model": DEEP, **tree}), **same) for tree, same in cases]


def _turned_and_planned(config: Config, **same: Any) -> tuple[int, int]:
    most = 0
    original = Fp8Products.transposed_codes

    def counting(self: Fp8Products) -> torch.Tensor:
        nonlocal most
        codes = original(self)
        own.add(self)
        lasting = sum(one._transposed.numel() for one in own if one._transposed is not None)
        most = max(most, lasting + (codes.numel() if self._transposed is None else 0))
        return codes

    own: set[Any] = set()
    experiment = Experiment(
        layout=layout_of(config),
        model=DEEP,
        storage=storage_of(config),
        transposes_kept=config.base.transposes_kept or 0,
        precision="bf16",
        steps=1,
        **same,
    )
    with mock.patch.object(Fp8Products, "transposed_codes", counting):
        train_twin(experiment)
    shape = resolve_shape(config.model, tokenizer_vocab_size=VOCABULARY)
    method = choose_method(config.method, num_layers=shape.num_layers)
    names = names_read_backward(method, microbatch_of(config, shape), this_place().stage)
    return most, unpacked_bytes(build_rank(config, shape, method), config.base, read_backward=names)


LAYER, LARGEST = 128 * 384 + 128 * 128 + 2 * 128 * 256, 128 * 384
TOP = {"name": "ft_top2"}


def top(full: bool = False, method: Any = TOP, **base: Any) -> tuple[Any, Any]:
    """A case: the last two layers trained, unless `method` says otherwise."""
    train = {"precision": "bf16", "recompute": "full" if full else "none"}
    tree = {"method": method, "base": {"storage": "fp8", **base}, "train": train}
    return tree, {"method": method, "recompute": train["recompute"]}


@pytest.mark.parametrize(
    ("parallel", "cases"),
    [
        # Of 8 layers six are frozen. Nothing trains below them, unless recomputation has to have it so.
        (
            {},
            [
                (top(transposes="kept"), [0]),
                (top(transposes_kept=3), [0]),
                (top(full=True, transposes="kept"), [6 * LAYER]),
                (top(full=True, transposes_kept=3), [3 * LAYER + LARGEST]),
                # Adapters of the last three: below the first of them qkv's input needs no gradient.
                (top(method={"layers": {"0-4": {"q": 0, "v": 0}}}, transposes="kept"), [3 * LAYER - LARGEST]),
            ],
        ),
        # A later stage's input always needs one.
        (
            {"pipeline": 2},
            [(top(transposes="kept"), [0, 2 * LAYER]), (top(transposes_kept=1), [0, LAYER + LARGEST])],
        ),
        # Stage 0 has layers 0, 1, 4 and 5; stage 1 has 2, 3, and the two that are trained.
        (
            {"pipeline": 2, "virtual_pipeline": 2},
            [(top(transposes="group"), [2 * LAYER] * 2), (top(transposes_kept=1), [LAYER + LARGEST] * 2)],
        ),
    ],
    ids=["one stage", "two stages", "interleaved"],
)
def test_what_is_planned_is_what_is_turned_round(pool: Pool, parallel: Any, cases: list[Any]) -> None:
    given = [({**tree, "parallel": parallel}, same) for (tree, same), _ in cases]
    found = pool.run(parallel.get("pipeline", 1), turned_and_planned, cases=given)
    assert found == [[(size, size) for size in sizes] for sizes in zip(*(sizes for _, sizes in cases), strict=True)]

# SPDX-License-Identifier: Apache-2.0
"""Collectives behind products (`layers.exchange`) against collectives before and after them.

    python -m pytest tests/layers/test_exchange.py -m multigpu

Processes of a CPU exchange through files (`shared_boxes`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory as symmetric

from lora_megatron.config import Config, ModelSection
from lora_megatron.config.sections import ParallelSection
from lora_megatron.errors import ConfigError
from lora_megatron.layers import exchange
from lora_megatron.layers.sequence_shards import SequenceShards
from lora_megatron.layers.storage.choose import StorageFormat
from lora_megatron.layers.storage.product import Product, product_with
from lora_megatron.methods.choose import choose_method
from lora_megatron.model.checks import check_plan
from lora_megatron.model.presets import resolve_shape
from lora_megatron.parallel.groups import Layout
from lora_megatron.parallel.shared_box import Box
from tests.comparison import compare, frobenius
from tests.layers.shared_boxes import DELAY_S, NO_BARRIER, NO_TURNS, SharedBox, exchanging
from tests.pool import Pool
from tests.twin import Experiment, Record, train_twins

GPUS = torch.cuda.device_count()
several_gpus = [pytest.mark.multigpu, pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")]


@pytest.fixture
def nccl() -> Iterator[Pool]:
    """New processes for each test: torch remembers symmetric memory by a group's name, and names come again."""
    pool = Pool(min(GPUS, 4), backend="nccl")
    yield pool
    pool.close()


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if GPUS else torch.device("cpu")


def products(inner: int, columns: int) -> Iterator[tuple[str, Product]]:
    """Of the same matrix in fp32, bf16 and FP8."""
    matrix = torch.randn(inner, columns, generator=torch.Generator().manual_seed(1)).to(device())
    yield "fp32", product_with(matrix)
    yield "bf16", product_with(matrix.bfloat16())
    stored = StorageFormat("fp8").make(columns, inner, device=device(), axis=0, group=None)
    stored.store(matrix.t())
    yield "fp8", stored.forward_product(torch.bfloat16)


def differences(
    sizes: list[tuple[int, int, int]], turns: str, delay: float = 0.0, fault: str = ""
) -> list[tuple[str, float]]:
    """Relative difference of each of `turns` (g: a gather, s: a sum), with an exchange and without."""
    group = dist.group.WORLD
    assert group is not None
    found = []
    with exchanging(delay=delay, fault=fault):
        behind = SequenceShards.over(group, overlap=True, device=device())
        assert behind.exchange is not None
        for rows, inner, columns in sizes:  # the boxes grow
            for name, product in products(inner, columns):
                asked = [(kind, *_operands(product, kind, rows, inner, turn)) for turn, kind in enumerate(turns)]
                got = [_answers(behind, product, *one) for one in asked]
                dist.barrier()
                for one, answers in zip(asked, got, strict=True):
                    wanted = _answers(SequenceShards(group), product, *one)
                    assert {key: answer.shape for key, answer in answers.items()} == {
                        key: want.shape for key, want in wanted.items()
                    }
                    for key, want in wanted.items():
                        apart = float((answers[key] - want).float().norm() / want.float().norm())
                        found.append((f"{name} {key}", apart))
    return found


CALLS = {"g": "product_of_all", "s": "sum_of_products", "a": "sum_of_products", "G": "of_all", "S": "sum_of"}
"""The last two are of what otherwise goes beside, alone; with `a` its product with factors is added to the rows."""


def _answers(
    shards: SequenceShards, product: Product, kind: str, parts: Sequence[torch.Tensor], beside: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    call = getattr(shards, CALLS[kind])
    if kind in "GS":
        return {kind: call(beside)}
    added = {"factors": _factors(product, beside)} if kind == "a" and beside is not None else {}
    output, extra = call(product, *parts, beside=beside, **added)
    assert (extra is None) == (beside is None)
    return {kind: output} if extra is None else {kind: output, f"{kind} beside": extra}


def _factors(product: Product, beside: torch.Tensor) -> list[torch.Tensor]:
    """Of rank 1 each, as large as the product's columns; the same on every rank."""
    generator = torch.Generator().manual_seed(9)
    factors = torch.randn(beside.shape[-1], product.columns, generator=generator).to(device(), product.dtype)
    return list(factors.split(1))


def _operands(
    product: Product, kind: str, rows: int, inner: int, turn: int
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """Random rows of this rank, others at every turn, and what goes beside them: of another width at each turn, and at
    every third nothing."""
    parts, columns = _parts(product, kind.lower(), rows, inner, turn), (turn + 1) % 3
    columns = columns or (1 if kind in "GS" else 0)
    if not columns:
        return parts, None
    generator = torch.Generator().manual_seed(100 * dist.get_rank() + turn + 50)
    beside = torch.randn(columns, parts[0].shape[0] // 2, 2, generator=generator).to(device(), product.dtype)
    return parts, beside.permute(1, 2, 0)  # [s, b, columns], which need not be contiguous


def _parts(product: Product, kind: str, rows: int, inner: int, turn: int) -> tuple[torch.Tensor, ...]:
    """Random rows of this rank, others at every turn."""
    generator = torch.Generator().manual_seed(100 * dist.get_rank() + turn)
    count = rows if kind == "g" else rows * dist.get_world_size()
    return product.parts(torch.randn(count, inner, generator=generator).to(device(), product.dtype))


def wrong(pool: Pool, world: int, **what: Any) -> list[str]:
    """Which differ by more than rounding, on any rank: of a gather too a library multiplies fewer rows in another
    order."""
    rounding = {"fp32": 1e-6, "bf16": 2**-7, "fp8": 2**-7}

    def bound(name: str) -> float:
        """Nothing rounds what is gathered beside a product."""
        return 0.0 if name.endswith(("g beside", "G")) else rounding[name.split()[0]]

    each = pool.run(world, differences, **what)
    return [name for found in each for name, difference in found if not difference <= bound(name)]


@pytest.mark.parametrize("world", [pytest.param(2, marks=several_gpus), pytest.param(4, marks=several_gpus)])
def test_an_exchange_gives_what_collectives_give(nccl: Pool, world: int) -> None:
    if world > GPUS:
        pytest.skip(f"needs {world} CUDA devices")
    assert wrong(nccl, world, sizes=[(16, 32, 64), (512, 256, 1024)], turns="gsggsssgGsSgGSSagaa") == []


@pytest.mark.parametrize("world", [2, 4])
def test_it_does_through_files_too(pool: Pool, world: int) -> None:
    assert wrong(pool, world, sizes=[(8, 32, 16), (16, 32, 64)], turns="gsggsssgGsSgGSSagaa", delay=DELAY_S) == []


@pytest.mark.parametrize(("fault", "turns"), [(NO_BARRIER, "g"), (NO_BARRIER, "s"), (NO_TURNS, "gg"), (NO_TURNS, "ss")])
def test_a_missing_barrier_is_missed(pool: Pool, fault: str, turns: str) -> None:
    missed = wrong(pool, 2, sizes=[(8, 32, 16)], turns=turns, delay=DELAY_S, fault=fault)
    assert {name.endswith("beside") for name in missed} == {False, True}


EXPERIMENTS = [
    Experiment(method={"targets": {"q": 4, "k": 1, "v": 2, "o": 3, "fc1": 2, "fc2": 5}, "alpha": 2}),
    Experiment(model={"preset": "tiny-llama", "num_layers": 4}, recompute="full"),
    Experiment(recompute="selective", recompute_modules=("mlp",), steps=2),  # two gathers in a row
]
FP8 = Experiment(
    method={"targets": {"q": 4, "v": 4, "o": 3, "fc1": 2, "fc2": 5}, "alpha": 2},
    model={"preset": "tiny", "num_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "ffn_hidden_size": 256},
    precision="bf16",
    steps=2,
)


def train_exactly(experiments: list[Experiment]) -> list[Record | None]:
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    with exchanging():
        return train_twins(experiments)


def check_training(
    pool: Pool, world: int, *, formats: Sequence[StorageFormat | None], exactly: Sequence[Experiment] = EXPERIMENTS
) -> None:
    """fp32 as exact as without sharding; bf16 and FP8 beside the same layout without overlap."""
    layout = Layout(tensor=world, sequence=True)
    stored = [replace(FP8, storage=kind) for kind in formats]

    def record(size: int, **changes: Any) -> list[Record]:
        experiments = [replace(experiment, **changes) for experiment in (*exactly, *stored)]
        found: list[Record] = pool.run(size, train_exactly, experiments=experiments)[0]
        return found

    whole = record(1)
    plain = record(world, layout=layout)
    behind = record(world, layout=layout, tp_comm_overlap=True)
    exact = len(exactly)
    for got, want in zip(behind[:exact], whole[:exact], strict=True):
        assert compare(got, want) > 20
    for got, want, twin in zip(behind[exact:], plain[exact:], whole[exact:], strict=True):
        assert got["complaints"] == []
        apart = frobenius(want["grads"][0], twin["grads"][0])  # what sharding alone changes by rounding
        assert frobenius(got["grads"][0], want["grads"][0]) <= 2 * apart
        assert got["loss"][0] == pytest.approx(want["loss"][0], abs=2**-8)


@pytest.mark.parametrize("world", [pytest.param(2, marks=several_gpus)])
def test_training_behind_an_exchange(nccl: Pool, world: int) -> None:
    check_training(nccl, world, formats=[None, StorageFormat("fp8"), StorageFormat("nf4", "fp8")])


@pytest.mark.slow
def test_training_through_files(pool: Pool) -> None:
    check_training(pool, 2, formats=[None, StorageFormat("fp8")])


@pytest.mark.slow
def test_training_of_four_through_files(pool: Pool) -> None:
    short = replace(EXPERIMENTS[0], model={"preset": "tiny", "num_layers": 2}, steps=1)
    check_training(pool, 4, formats=[None, StorageFormat("fp8")], exactly=[short])


def barriers_of(turns: str) -> list[int]:
    """Of a gather or a sum each; `.` stands for a CUDA graph that was launched in between."""
    group = dist.group.WORLD
    assert group is not None
    with exchanging():
        shards = SequenceShards.over(group, overlap=True, device=device())
        (product,) = (product for name, product in products(32, 16) if name == "fp32")
        counted, before = [], SharedBox.barriers
        for turn in turns:
            if turn == ".":
                exchange.forget_turns()
                continue
            _answers(shards, product, turn, *_operands(product, turn, 8, 32, 0))
            counted.append(SharedBox.barriers - before)
            before = SharedBox.barriers
        return counted


@pytest.mark.skipif(GPUS > 0, reason="counts the barriers of the boxes that stand in for a GPU's")
def test_one_barrier_a_product_where_gathers_and_sums_take_turns(pool: Pool) -> None:
    for counted in pool.run(2, barriers_of, turns="gsgssg.s.sg"):
        assert counted == [2, 1, 1, 1, 2, 1, 2, 2, 1]


class Group:
    """Of GPUs that are not there."""

    group_name = "none"


def test_gpus_apart_and_full_ones_are_told_from_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA driver error: something\nwith a trace")

    box = Box(Group(), needed_by="parallel.tp_comm_overlap")  # type: ignore[arg-type]  # it asks for the name alone
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(symmetric, "rendezvous", fail)
    monkeypatch.setattr(symmetric, "empty", lambda size, dtype, device: torch.empty(size, dtype=dtype))
    with pytest.raises(
        ConfigError, match=r"do not reach each other's memory \(CUDA driver error: something\): set"
    ) as one:
        box.holding(16)
    assert "\n" not in str(one.value)
    assert (box.memory, box.handle, box.older) == (None, None, []), "nothing half made"
    monkeypatch.setattr(symmetric, "rendezvous", lambda memory, name: memory.numel())
    assert box.holding(16)
    monkeypatch.setattr(symmetric, "rendezvous", fail)
    with pytest.raises(ConfigError):
        box.holding(17)
    assert not box.holding(16), "the one there was stays"
    assert (box.size, box.handle, box.older) == (16, 16, [])
    monkeypatch.setattr(symmetric, "empty", fail)
    with pytest.raises(torch.OutOfMemoryError, match="no room for 1,024 bytes that GPUs share"):
        Box(Group(), needed_by="parallel.tp_comm_overlap").holding(1024)  # type: ignore[arg-type]  # the same


def test_without_sequence_parallelism_there_is_nothing_to_overlap() -> None:
    config = Config(model=ModelSection(preset="gpt2-small"), parallel=ParallelSection(tensor=2, tp_comm_overlap=True))
    shape = resolve_shape(config.model, tokenizer_vocab_size=100)
    method = choose_method(config.method, num_layers=shape.num_layers)
    with pytest.raises(ConfigError, match=r"parallel.tp_comm_overlap = true .* set parallel.sequence=true"):
        check_plan(config, shape, method, 2)

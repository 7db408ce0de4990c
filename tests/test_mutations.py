# SPDX-License-Identifier: Apache-2.0
"""The oracle is worth what it catches: each deliberate fault below must make it fail, in the place the fault is in.

A fault is patched inside the worker processes for one run. `expects` is what the complaint must name, so that a
fault in one place is not counted as caught because another broke.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from lora_megatron.layers import adapted_attention, column, dropout, lora, norm, row
from lora_megatron.layers.low_rank import Update
from lora_megatron.layers.qkv import Part
from lora_megatron.layers.sharding import REPLICATED, Shard
from lora_megatron.layers.vocabulary_shard import VocabularyShard
from lora_megatron.model import build, gpt, spec
from lora_megatron.parallel.groups import Layout
from lora_megatron.training.optimizer import MegatronAdamW
from tests.comparison import Mismatch, compare
from tests.pool import Pool
from tests.twin import Experiment, Record, train_twin, train_twins

GPT = Experiment(steps=1, global_batch_size=2)
LLAMA = replace(GPT, model={"preset": "tiny-llama", "num_layers": 2})
TP2, SP2 = Layout(tensor=2), Layout(tensor=2, sequence=True)


def undeclared_sum(factor: str) -> Any:
    """`declare` that forgets to say that the gradient of the replicated factor is a sum over sequence shards."""
    original = lora.declare

    def declare(parameter: Any, shard: Shard, *, sum_over_sequence_shards: bool = False) -> None:
        original(parameter, shard)

    return mock.patch.object({"lora": lora, "norm": norm}[factor], "declare", declare)


def identity(x: Tensor, group: Any = None) -> Tensor:
    return x


def thirds(rows: int, *, shape: Any) -> tuple[Part, ...]:
    third = rows // 3
    return tuple(Part(name, 1, i * third, (i + 1) * third, rows) for i, name in enumerate("qkv"))


@contextlib.contextmanager
def adapters_in_thirds() -> Iterator[None]:
    """The rows of adapters alone: heads are split by megatron-core, as where there is none, or their shapes are off."""
    own_way = mock.patch.object(adapted_attention.AdaptedAttention, "_is_plain", return_value=False)
    with mock.patch.object(spec, "_qkv_rows", thirds), own_way:
        yield


def b_declared_replicated() -> Any:
    original = lora.declare

    def declare(parameter: Any, shard: Shard, **kwargs: Any) -> None:
        original(parameter, REPLICATED if shard.axis == 0 else shard, **kwargs)

    return mock.patch.object(lora, "declare", declare)


def one_block_per_gated_fc1() -> Any:
    original = column.Shard
    return mock.patch.object(column, "Shard", lambda axis, blocks=1: original(axis))


def b_applied_before_the_sum() -> Any:
    """Every rank adds the whole low-rank update before the ranks are summed: it counts once per rank."""
    original = row.LoraRowParallelLinear.low_rank_update

    def low_rank_update(layer: row.LoraRowParallelLinear, u: Tensor) -> Update:
        update, ranks = original(layer, u), build.mpu.get_tensor_model_parallel_world_size()
        return replace(update, scales=tuple(scale * ranks for scale in update.scales))

    return mock.patch.object(row.LoraRowParallelLinear, "low_rank_update", low_rank_update)


def a_from_the_fan_in_of_a_shard() -> Any:
    original = lora.LoraFactors._initial_a

    def initial_a(shape: tuple[int, int], seed: int, name: str) -> Tensor:
        return original(shape, seed, name) * math.sqrt(build.mpu.get_tensor_model_parallel_world_size())

    return mock.patch.object(lora.LoraFactors, "_initial_a", staticmethod(initial_a))


def other_dropout(**changes: Any) -> Any:
    """Column layers whose dropout has `changes`, a function of the tensor rank each."""
    original = dropout.Dropout.of_this_microbatch

    def of_this_microbatch(p: float, seed: int, **cut: Any) -> dropout.Dropout:
        rank = build.mpu.get_tensor_model_parallel_rank()
        changed = {name: change(rank, seed) for name, change in changes.items()}
        return replace(original(p, seed, **cut), **changed)

    return mock.patch.object(column.Dropout, "of_this_microbatch", of_this_microbatch)


def dropout_per_rank() -> Any:
    return other_dropout(seed=lambda rank, seed: seed + rank)


def dropout_without_a_cut() -> Any:
    """Each sequence shard drawn as if it were the whole sequence: the shards' masks are the same."""
    return other_dropout(sequence=lambda rank, seed: (0, 1))


def frozen_linear_without_its_sum() -> Any:
    original = column.frozen_linear
    return mock.patch.object(column, "frozen_linear", lambda x, w, *bias, **group: original(x, w, *bias))


def hidden_gradient_of_own_columns() -> Any:
    """The loss's gradient to the hidden states from this rank's columns of the vocabulary alone."""
    return mock.patch.object(VocabularyShard, "sum_over_ranks", lambda shard, partial, out: out.copy_(partial))


def gradient_not_divided_by_tokens() -> Any:
    original = MegatronAdamW.step
    return mock.patch.object(MegatronAdamW, "step", lambda optimizer, tokens: original(optimizer, 1))


@dataclass(frozen=True)
class Fault:
    """What is broken, on which run, and what the oracle must complain about."""

    breaks: Callable[[], Any]
    experiment: Experiment
    expects: str


def on(layout: Layout, experiment: Experiment = GPT, **changes: Any) -> Experiment:
    return replace(experiment, layout=layout, **changes)


COLUMN_A = r"grad.*linear_(qkv|fc1)\.adapters\.\w+\.lora_A: not replicated"
FAULTS: dict[str, Fault] = {
    "column A not summed over sequence shards": Fault(lambda: undeclared_sum("lora"), on(SP2), COLUMN_A),
    "row B not summed over sequence shards": Fault(
        lambda: undeclared_sum("lora"),
        on(SP2, method={"targets": {"o": 2}}),
        r"grad.*linear_proj\.adapters\.o\.lora_B: not replicated",
    ),
    "norm not summed over sequence shards": Fault(
        lambda: undeclared_sum("norm"), on(SP2, method={"name": "full"}), r"grad.*layernorm.*: not replicated"
    ),
    "f removed": Fault(
        lambda: mock.patch.object(column, "copy_to_tensor_model_parallel_region", identity), on(TP2), COLUMN_A
    ),
    "gradient of a frozen layer's input not summed": Fault(frozen_linear_without_its_sum, on(TP2), "not replicated"),
    "row sum removed": Fault(
        lambda: mock.patch.object(row, "reduce_from_tensor_model_parallel_region", identity), on(TP2), "eval|loss|repl"
    ),
    "QKV in equal thirds": Fault(adapters_in_thirds, on(TP2), "eval|loss"),
    "QKV of grouped queries in equal thirds": Fault(
        adapters_in_thirds, on(TP2, LLAMA, method={"targets": {"k": 2}}), "born|eval"
    ),
    "B declared replicated": Fault(b_declared_replicated, on(TP2), r"lora_B: not replicated"),
    "gated fc1 as one block": Fault(one_block_per_gated_fc1, on(TP2, LLAMA), "eval"),
    "B applied before the sum": Fault(b_applied_before_the_sum, on(TP2), "eval"),
    "A drawn from a shard's fan-in": Fault(a_from_the_fan_in_of_a_shard, on(TP2), r"eval|born.*lora_A"),
    "padded vocabulary not masked": Fault(
        lambda: mock.patch.object(gpt.Gpt, "mask_padded_vocabulary", return_value=None), on(TP2), "eval"
    ),
    "gradient of hidden states not summed over the vocabulary": Fault(
        hidden_gradient_of_own_columns, on(TP2), "not repl"
    ),
    "dropout drawn per rank": Fault(dropout_per_rank, on(TP2, dropout=0.5), COLUMN_A),
    "dropout of sequence shards alike": Fault(dropout_without_a_cut, on(SP2, dropout=0.5), "loss of step 0"),
    "gradient not divided by tokens": Fault(gradient_not_divided_by_tokens, on(Layout()), "norm of step 0"),
}


@contextlib.contextmanager
def broken(fault: str | None) -> Iterator[None]:
    with FAULTS[fault].breaks() if fault else contextlib.nullcontext():
        yield


def train_broken(faults: list[str]) -> list[Record | None]:
    """One run per fault, all in one world."""
    records = []
    for fault in faults:
        with broken(fault):
            records.append(train_twin(FAULTS[fault].experiment))
    return records


_twins: dict[str, Record] = {}
_broken: dict[str, Record] = {}


def twin(pool: Pool, experiment: Experiment) -> Record:
    """The sound unsharded run; all are made on the first call."""
    if not _twins:
        whole = {repr(e): e for e in (fault.experiment.with_layout() for fault in FAULTS.values())}
        _twins.update(zip(whole, pool.run(1, train_twins, experiments=list(whole.values()))[0], strict=True))
    return _twins[repr(experiment.with_layout())]


def record_of(pool: Pool, fault: str) -> Record:
    if not _broken:
        for world in (1, 2):
            names = [n for n, f in FAULTS.items() if f.experiment.layout.tensor == world]
            _broken.update(zip(names, pool.run(world, train_broken, faults=names)[0], strict=True))
    return _broken[fault]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_oracle_catches(pool: Pool, fault: str) -> None:
    with pytest.raises(Mismatch) as caught:
        compare(record_of(pool, fault), twin(pool, FAULTS[fault].experiment))
    assert re.search(FAULTS[fault].expects, str(caught.value)), str(caught.value)


def test_without_a_fault_the_same_runs_pass(pool: Pool) -> None:
    """Else any complaint would do."""
    sound = {repr(f.experiment): f.experiment for f in FAULTS.values() if f.experiment.layout.tensor == 2}
    for record, experiment in zip(
        pool.run(2, train_twins, experiments=list(sound.values()))[0], sound.values(), strict=True
    ):
        assert compare(record, twin(pool, experiment)) > 0


def train_without_input_gradient(recompute: str) -> Record | str | None:
    """A run whose frozen embedding gives no gradient to the layers above; the error if it ends in one."""
    with mock.patch.object(build, "_let_gradient_reach_input", return_value=None):
        try:
            return train_twin(replace(GPT, recompute=recompute))
        except RuntimeError as error:
            return str(error)


def test_full_recompute_needs_a_gradient_at_the_input(pool: Pool) -> None:
    """Recomputed layers run their backward only if an input needs a gradient: the trap behind the embedding's hook."""
    result = pool.run(1, train_without_input_gradient, recompute="full")[0]
    if isinstance(result, str):
        assert "does not require grad" in result
        return
    with pytest.raises(Mismatch):
        compare(result, twin(pool, GPT))
    assert any(not gradient.any() for gradient in result["grads"][0].values())

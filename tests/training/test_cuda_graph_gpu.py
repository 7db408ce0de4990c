# SPDX-License-Identifier: Apache-2.0
"""`train.cuda_graph` gives the eager step's losses, gradients and parameters to the bit, on every kind of step.

    python -m pytest tests/training/test_cuda_graph_gpu.py -m "gpu or multigpu" -s

A run: two eager steps, the capture (of the passes, and of the optimizer's step), replays, an evaluation, a step of
other shapes, a replay after it. Every step has data of its own, so that a graph which reads old inputs is noticed; a
test lets one do so. Sequences fit one tile of the attention's backward kernel, whose sums over several have no fixed
order; an eager run is repeated, and must repeat itself, before the graph is compared with it. The comparison is
rehearsed over gloo, without a graph.
"""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch

from lora_megatron.bench.workload import RandomTokens, build_trainer, free
from lora_megatron.config import Config, parse_config
from lora_megatron.model.checks import layout_of
from lora_megatron.model.presets import resolve_shape
from lora_megatron.parallel import groups
from lora_megatron.training.cuda_graph import WARM_UP_STEPS, StaticInputs
from lora_megatron.training.held_out import held_out_loss
from lora_megatron.training.loop import Trainer, train_step
from lora_megatron.training.optimizer import MegatronAdamW, Optimizer
from tests.gpus import one_gpu, two_gpus
from tests.pool import Pool

LENGTH, VOCABULARY = 64, 300
STEPS, OTHER_SHAPES = 8, 7
CLIP = 1e-2
Tree = dict[str, Any]
Values = dict[str, torch.Tensor]


@dataclass(frozen=True)
class StepRecord:
    """What a step left: exact numbers, and tensors on the CPU."""

    loss: float
    norm: float
    lr: float
    gradients: Values
    parameters: Values


def config_of(case: Tree, *, graph: bool, steps: int = STEPS) -> Config:
    """A small model, two microbatches a rank, warm-up and decay of the learning rate, gradients that are clipped."""
    tree: Tree = {
        "model": {"num_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": LENGTH},
        "base": {},
        "method": {"targets": {"q": 4, "k": 2, "v": 4, "o": 3, "fc1": 4, "fc2": 5}, "alpha": 8},
        "optimizer": {"lr": 1e-3, "clip_grad": CLIP},
        "parallel": {},
        "data": {"sequence_length": LENGTH, "micro_batch_size": 2, "global_batch_size": 4},
        "train": {"precision": "bf16", "steps": steps, "warmup_steps": 2, "cuda_graph": graph},
    }
    for name, values in case.items():
        tree[name] = {**tree[name], **values}
    return parse_config(tree)


def randomise_b(trainer: Trainer) -> None:
    """B starts at zero and would hide a wrong gradient of A in the first step."""
    generator = torch.Generator().manual_seed(7)
    for chunk in trainer.chunks:
        for name, parameter in chunk.named_parameters():
            if name.endswith("lora_B"):
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    trainer.optimizer.refresh_master()


def snapshot(trainer: Trainer) -> tuple[Values, Values]:
    """(gradients, parameters) by name, of what trains."""
    pairs = [(n, p) for chunk in trainer.chunks for n, p in chunk.named_parameters() if p.requires_grad]
    # main_grad is what megatron-core's DDP puts on a parameter, which torch's types cannot know.
    gradients = {name: p.main_grad.detach().cpu().clone() for name, p in pairs}  # type: ignore[attr-defined]
    return gradients, {name: p.detach().cpu().clone() for name, p in pairs}


def run(config: Config, *, stale: int = 0) -> tuple[list[StepRecord], float]:
    """All steps of a trainer, and the held-out loss in between; step `stale` gets the data of the one before it."""
    shape = resolve_shape(config.model, tokenizer_vocab_size=VOCABULARY)
    trainer = build_trainer(config, shape, load=None)
    randomise_b(trainer)
    ranks = torch.distributed.get_world_size() // config.parallel.tensor
    count = config.data.micro_batch_size * ranks
    data = config.data.model_copy(update={"sequence_length": LENGTH // 2, "global_batch_size": count})
    other = config.model_copy(update={"data": data})
    usual = trainer.config, trainer.data
    records, held_out = [], 0.0
    for step in range(1, config.train.steps + 1):
        trainer.config, trainer.data = usual
        if step == OTHER_SHAPES:
            # A step asks `microbatch` of its data alone, as in `bench.workload`.
            trainer.config, trainer.data = other, RandomTokens(other, vocab_size=VOCABULARY)  # type: ignore[assignment]
        if step == stale:
            trainer.consumed_samples -= config.data.global_batch_size
        report, verdict = train_step(trainer)
        assert not verdict.problem, verdict
        assert report.grad_norm > CLIP, "clipping is active"
        if trainer.graph is not None:
            assert trainer.graph.is_captured == (step > WARM_UP_STEPS)
            assert has_captured(trainer.optimizer) == (step > WARM_UP_STEPS and config.optimizer.sharding == "none")
        trainer.step = report.step
        records.append(StepRecord(report.loss, report.grad_norm, report.lr, *snapshot(trainer)))
        if step == 4:
            # It asks `evaluation_microbatches` alone.
            held_out = held_out_loss(trainer.chunks, HeldOut(config)).mean  # type: ignore[arg-type]
    if trainer.graph is not None:
        trainer.graph.release()
    return records, held_out


def has_captured(optimizer: Optimizer) -> bool:
    """Whether its steps are a graph's."""
    assert isinstance(optimizer, MegatronAdamW)
    return optimizer._graph is not None and optimizer._graph._captured is not None


class HeldOut:
    """Three microbatches of the training's shape."""

    def __init__(self, config: Config) -> None:
        self._source = RandomTokens(config, vocab_size=VOCABULARY)

    def evaluation_microbatches(self, rank: int, size: int, *, multiple_of: int) -> list[Any]:
        return [self._source.microbatch(10**6 + 100 * rank + 10 * index) for index in range(3)]


def complaints(got: list[StepRecord], want: list[StepRecord]) -> list[str]:
    """Every number that is not the same, by step and name, with how far it is off."""
    found = []
    for step, (a, b) in enumerate(zip(got, want, strict=True), start=1):
        for name in ("loss", "norm", "lr"):
            if getattr(a, name) != getattr(b, name):
                found.append(f"step {step}: {name} is {getattr(a, name)!r}, not {getattr(b, name)!r}")
        for kind in ("gradients", "parameters"):
            values, others = getattr(a, kind), getattr(b, kind)
            assert values.keys() == others.keys()
            for name, value in values.items():
                if not torch.equal(value, others[name]):
                    most = (value.double() - others[name].double()).abs().max().item()
                    found.append(f"step {step}: {kind} of {name} differ by up to {most:.3g}")
    return found


def all_move(records: list[StepRecord]) -> bool:
    """Whether each step had another loss, and each trained tensor a gradient and other values at the end."""
    first, last = records[0], records[-1]
    moved = all(not torch.equal(value, last.parameters[name]) for name, value in first.parameters.items())
    return moved and len({record.loss for record in records}) == len(records) and all(map(_has_gradients, records))


def _has_gradients(record: StepRecord) -> bool:
    return all(bool(gradient.any()) for gradient in record.gradients.values())


def compare(case: Tree, *, use_graph: bool = True) -> list[str]:
    """What is wrong on this rank; an eager run stands in for the graph's without `use_graph`."""
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")  # as `join_world` does, which a pool does without
    torch.set_float32_matmul_precision("highest")
    eager = config_of(case, graph=False)
    groups.build_mesh(layout_of(eager), seed=1, timeout_minutes=2)
    outcomes = []
    for graph in (False, False, use_graph):
        outcomes.append(run(config_of(case, graph=graph)))
        gc.collect()
        free()
    (want, want_held_out), (again, _), (got, held_out) = outcomes
    wrong = [f"eager against eager: {text}" for text in complaints(again, want)]
    wrong += [] if all_move(want) else ["nothing moves, or no data changes: the comparison says nothing"]
    wrong += [f"graph against eager: {text}" for text in complaints(got, want)]
    wrong += [] if held_out == want_held_out else [f"held-out losses are {held_out}, not {want_held_out}"]
    return wrong


FP8: Tree = {"base": {"storage": "fp8"}}
LLAMA: Tree = {
    "model": {"preset": "tiny-llama", "num_layers": 2, "hidden_size": 128, "max_position_embeddings": LENGTH}
}
RECOMPUTED: Tree = {"train": {"recompute": "full"}}
MLP_RECOMPUTED: Tree = {"train": {"recompute": "selective", "recompute_modules": ["mlp"]}}
CASES: dict[str, Tree] = {
    "bf16": {},
    "bf16-recomputed": RECOMPUTED,
    "fp8": FP8,
    "fp8-recomputed": {**FP8, **RECOMPUTED},
    "packed": {"data": {"packing": True}},
    "full": {"method": {"name": "full"}},
    "selective": {"train": {"recompute": "selective"}},
    "llama-recomputed": {**LLAMA, **RECOMPUTED},
    "fp8-mlp-recomputed": {**FP8, **MLP_RECOMPUTED},
    "llama-mlp-recomputed": {**LLAMA, **MLP_RECOMPUTED},
    "nf4-in-fp8": {"base": {"storage": "nf4", "gemm": "fp8"}},
}
TP2: Tree = {"parallel": {"tensor": 2, "sequence": True}}
OVERLAP: Tree = {
    "parallel": {"tensor": 2, "sequence": True, "tp_comm_overlap": True},
    "data": {"micro_batch_size": 4, "global_batch_size": 8},  # so many tokens that u2 is made in the activation's pass
}
TWO_GPUS: dict[str, Tree] = {
    "tp2-sp-bf16": TP2,
    "tp2-sp-fp8-recomputed": {**TP2, **FP8, **RECOMPUTED},
    "tp2-sp-overlap": OVERLAP,
    "tp2-sp-fp8-overlap": {**OVERLAP, **FP8},
    "tp2-sp-fp8-overlap-mlp-recomputed": {**OVERLAP, **FP8, **MLP_RECOMPUTED},
    "tp2-sp-overlap-q": {**OVERLAP, "method": {"targets": {"q": 4}}},
    "tp2-sp-overlap-fc2": {**OVERLAP, "method": {"targets": {"fc2": 4}}},
    "tp2-sp-fp8-mlp-recomputed": {**TP2, **FP8, **MLP_RECOMPUTED},
    "tp2-fp8": {"parallel": {"tensor": 2}, **FP8},
    "dp2-sharded": {"optimizer": {"sharding": "megatron"}, "data": {"global_batch_size": 8}},
}


@pytest.mark.parametrize("case", [pytest.param(name, marks=one_gpu) for name in CASES])
def test_a_graph_equals_eager_steps(nccl: Pool, case: str) -> None:
    assert nccl.run(1, compare, case=CASES[case]) == [[]]


@pytest.mark.parametrize("case", [pytest.param(name, marks=two_gpus) for name in TWO_GPUS])
def test_graphs_of_two_gpus_equal_eager_steps(nccl: Pool, case: str) -> None:
    assert nccl.run(2, compare, case=TWO_GPUS[case]) == [[], []]


def run_with_frozen_inputs() -> list[str]:
    """The graph's run again, in which no replay is given new inputs."""
    config = config_of({}, graph=True)
    groups.build_mesh(layout_of(config), seed=1, timeout_minutes=2)
    want, _ = run(config)
    fill, calls = StaticInputs.fill, [0]

    def fill_once(self: StaticInputs, index: int, batch: Any) -> bool:
        calls[0] += 1
        return fill(self, index, batch) if calls[0] <= 2 else True

    with patch.object(StaticInputs, "fill", fill_once):
        got, _ = run(config)
    return complaints(got, want)


@pytest.mark.parametrize("_", [pytest.param(None, marks=one_gpu)])
def test_frozen_inputs_would_be_noticed(nccl: Pool, _: None) -> None:
    (found,) = nccl.run(1, run_with_frozen_inputs)
    assert [text for text in found if text.startswith("step 4: loss")]
    assert not [text for text in found if text.startswith(("step 1:", "step 2:", "step 3:"))]


def memory_after_graphs() -> tuple[int, int, int]:
    """Bytes allocated before and after a trainer with a graph lived, and reserved when it was gone."""
    config = config_of({}, graph=True)
    groups.build_mesh(layout_of(config), seed=1, timeout_minutes=2)
    run(config)  # makes what a process makes once
    free()
    before = torch.cuda.memory_allocated()
    run(config)
    free()
    return before, torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


@pytest.mark.parametrize("_", [pytest.param(None, marks=one_gpu)])
def test_a_graph_is_freed_with_its_trainer(nccl: Pool, _: None) -> None:
    ((before, after, reserved),) = nccl.run(1, memory_after_graphs)
    print(f"\nallocated {before} before, {after} after; reserved {reserved}")
    assert after - before < 2**20


def stale_data() -> list[str]:
    config = config_of({}, graph=False)
    groups.build_mesh(layout_of(config), seed=1, timeout_minutes=2)
    return complaints(run(config, stale=4)[0], run(config)[0])


@pytest.mark.slow  # a rehearsal of the GPU tests above; what it trains, `test_oracle` trains in every run
def test_rehearsal_of_the_comparison(pool: Pool) -> None:
    assert pool.run(1, compare, case=CASES["fp8-recomputed"], use_graph=False) == [[]]
    assert pool.run(2, compare, case=TWO_GPUS["tp2-sp-bf16"], use_graph=False) == [[], []]
    (found,) = pool.run(1, stale_data)
    for kind in ("loss", "norm", "gradients", "parameters"):
        assert [text for text in found if text.startswith(f"step 4: {kind}")]
    assert not [text for text in found if text.startswith(("step 1:", "step 2:", "step 3:"))]

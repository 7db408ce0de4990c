# SPDX-License-Identifier: Apache-2.0
"""What of `train.cuda_graph` shows without a GPU: refusals, which steps are captured, inputs, generators, reductions.

That a graph's step equals the eager one is tested where there is a GPU: `test_cuda_graph_gpu`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.tensor_parallel import random as megatron_random

from lora_megatron.config import Config, parse_config
from lora_megatron.errors import ConfigError
from lora_megatron.layers.sharding import is_summed_over_sequence_shards
from lora_megatron.methods.choose import choose_method
from lora_megatron.model.checks import check, check_plan
from lora_megatron.model.presets import resolve_shape
from lora_megatron.parallel.groups import Layout, build_mesh
from lora_megatron.training import step
from lora_megatron.training.cuda_graph import (
    WARM_UP_STEPS,
    StaticInputs,
    StepGraph,
    Turn,
    Turns,
    _generators_left_alone,
    reason_of,
    shapes_of,
)
from tests.commands.runs import attempt, make_corpus, make_tree
from tests.pool import Pool
from tests.twin import Experiment, Run, own_batches

CPU = torch.device("cpu")


def config_of(**sections: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {
        "model": {"preset": "tiny", "num_layers": 2},
        "train": {"cuda_graph": True},
        "data": {"sequence_length": 16},
    }
    return parse_config({**tree, **sections})


def complain(config: Config, world_size: int, *, plan: bool = True) -> str:
    shape = resolve_shape(config.model, tokenizer_vocab_size=100)
    with pytest.raises(ConfigError) as error:
        (check_plan if plan else check)(config, shape, choose_method(config.method, num_layers=2), world_size)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("sections", "world_size", "words"),
    [
        ({"method": {"dropout": 0.1}}, 1, ("method.dropout = 0.1", "set method.dropout=0")),
        ({"parallel": {"pipeline": 2}}, 2, ("parallel.pipeline = 2", "set parallel.pipeline=1")),
        ({"optimizer": {"sharding": "deepspeed"}}, 1, ("optimizer.sharding = deepspeed", "megatron or none")),
    ],
)
def test_what_a_graph_cannot_hold_is_refused(sections: dict[str, Any], world_size: int, words: tuple[str, ...]) -> None:
    said = complain(config_of(**sections), world_size)
    assert all(word in said for word in ("train.cuda_graph = true", *words, "train.cuda_graph=false"))
    without = config_of(**sections, train={"cuda_graph": False})
    shape = resolve_shape(without.model, tokenizer_vocab_size=100)
    check_plan(without, shape, choose_method(without.method, num_layers=2), world_size)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine must have no GPU")
def test_a_machine_without_a_gpu_is_refused_but_can_plan(tmp_path: Path) -> None:
    config = config_of()
    shape = resolve_shape(config.model, tokenizer_vocab_size=100)
    check_plan(config, shape, choose_method(config.method, num_layers=2), 1)
    said = complain(config, 1, plan=False)
    assert "no CUDA device" in said
    tree = make_tree(make_corpus(tmp_path / "corpus"), tmp_path / "run", train={"cuda_graph": True})
    tree["method"]["dropout"] = 0.0
    outcome = attempt(tree)
    assert (outcome.status, outcome.message) == (2, said)


def batch_of(length: int, *, mask: bool = False, start: int = 0) -> step.Batch:
    tokens = torch.arange(start, start + 2 * length).view(2, length)
    return {
        "tokens": tokens,
        "labels": tokens + 1,
        "loss_mask": torch.ones(2, length),
        "position_ids": torch.arange(length).expand(2, length),
        "attention_mask": torch.zeros(2, 1, length, length, dtype=torch.bool) if mask else None,
        "first_sample": start,
    }


def test_the_shapes_are_those_of_everything_a_graph_reads() -> None:
    usual = shapes_of(batch_of(8), 2)
    assert usual == shapes_of(batch_of(8, start=5), 2)
    others = [shapes_of(batch_of(8), 3), shapes_of(batch_of(4), 2), shapes_of(batch_of(8, mask=True), 2)]
    others.append(shapes_of({**batch_of(8), "loss_mask": torch.ones(2, 8, dtype=torch.float64)}, 2))
    assert usual not in others
    assert len(set(others)) == len(others)


def test_the_first_shapes_that_stay_are_captured() -> None:
    a, b = shapes_of(batch_of(8), 2), shapes_of(batch_of(4), 2)
    turns = Turns()
    assert [turns.next(shapes).value for shapes in (a, b, a)] == ["eager"] * 3, "none came twice in a row yet"
    assert [turns.next(a) for _ in range(WARM_UP_STEPS - 1)] == [Turn.EAGER] * (WARM_UP_STEPS - 1)
    assert [turns.next(shapes).value for shapes in (a, a, b, b, b, b, a)] == [
        "capture", "replay", "eager", "eager", "eager", "eager", "replay",
    ]  # fmt: skip


def test_inputs_stay_where_they_are() -> None:
    inputs = StaticInputs(batch_of(8, mask=True), 2, CPU)
    places = [t.data_ptr() for batch in inputs.batches for t in batch.values() if t is not None]
    assert len(set(places)) == 2 * 5
    for start in (0, 100):
        given = [batch_of(8, mask=True, start=start), batch_of(8, mask=True, start=start + 50)]
        assert all(inputs.fill(index, batch) for index, batch in enumerate(given))
        for got, want in zip(inputs.batches, given, strict=True):
            assert got["first_sample"] is None
            assert all(torch.equal(got[key], value) for key, value in want.items() if isinstance(value, torch.Tensor))
    assert places == [t.data_ptr() for batch in inputs.batches for t in batch.values() if t is not None]
    assert not inputs.fill(0, batch_of(8))
    assert not inputs.fill(0, batch_of(4, mask=True))
    assert torch.equal(inputs.batches[0]["tokens"], batch_of(8, start=100)["tokens"])


def eager_steps() -> None:
    """Loss and gradients of the steps before the capture."""
    experiment = Experiment()
    build_mesh(experiment.layout, seed=1, timeout_minutes=2)
    run, twin = Run(experiment), Run(experiment)
    graph = StepGraph()
    for number in range(WARM_UP_STEPS):
        batches = own_batches(experiment, number)
        assert graph.run_microbatches(run.ddp, batches) == step.run_microbatches(twin.ddp, batches)
        for one, other in zip(run.ddp, twin.ddp, strict=True):
            for mine, its in zip(one.buffers, other.buffers, strict=True):
                assert torch.equal(mine.grad_data, its.grad_data)
                assert mine.grad_data.any()
    assert not graph.is_captured


def test_steps_before_the_capture_are_eager_ones(pool: Pool) -> None:
    pool.run(1, eager_steps)


def generators() -> None:
    """Recomputed layers and forks run within, the generator does not move, and afterwards all is as it was."""
    experiment = Experiment(recompute="full")
    build_mesh(experiment.layout, seed=1, timeout_minutes=2)
    run = Run(experiment)
    batches = own_batches(experiment, 0)
    want = step.run_microbatches(run.ddp, batches)
    functions = megatron_random._get_cuda_rng_state, megatron_random._set_cuda_rng_state
    tracker = megatron_random.get_cuda_rng_tracker()
    torch.cuda.manual_seed(3)
    before, tracked = torch.cuda.get_rng_state().clone(), tracker.get_states()
    with _generators_left_alone():
        with tracker.fork():
            assert torch.equal(torch.cuda.get_rng_state(), before)
        got = step.run_microbatches(run.ddp, batches)
        assert torch.equal(torch.cuda.get_rng_state(), before)
    assert got == want
    assert (megatron_random._get_cuda_rng_state, megatron_random._set_cuda_rng_state) == functions
    assert tracker.get_states().keys() == tracked.keys()
    assert all(torch.equal(tracker.get_states()[name], state) for name, state in tracked.items())
    with tracker.fork():
        assert not torch.equal(torch.cuda.get_rng_state(), before)


def test_the_gpus_generator_is_left_alone(pool: Pool) -> None:
    pool.run(1, generators)


def gradients_by(finalize: Any, experiment: Experiment) -> tuple[list[torch.Tensor], int]:
    """All gradients, and the tokens of the loss."""
    run, ours = Run(experiment), step._finalize
    if finalize is finalize_model_grads:  # which of them it has to sum is kept from it
        for parameter in (p for chunk in run.chunks for p in chunk.parameters()):
            parameter.sequence_parallel = is_summed_over_sequence_shards(parameter)
    step._finalize = finalize
    try:
        loss = step.run_microbatches(run.ddp, own_batches(experiment, 0))
    finally:
        step._finalize = ours
    return [buffer.grad_data.clone() for chunk in run.ddp for buffer in chunk.buffers], loss.tokens


def both_reductions(experiment: Experiment) -> None:
    build_mesh(experiment.layout, seed=1, timeout_minutes=2)
    theirs, _ = gradients_by(finalize_model_grads, experiment)
    mine, tokens = gradients_by(step._finalize, experiment)
    assert any(gradient.any() for gradient in mine)
    share = 1.0 / torch.tensor(tokens)  # by which megatron-core multiplies as well
    assert all(torch.equal(a * share, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "sequence": True}, {"pipeline": 2}])
def test_the_reduction_of_gradients_is_megatrons(pool: Pool, layout: dict[str, Any]) -> None:
    """Data parallelism takes what is left of four ranks."""
    pool.run(4, both_reductions, experiment=Experiment(layout=Layout(**layout)))


def test_a_capture_that_ran_out_of_memory_says_so() -> None:
    def capture() -> None:
        try:
            raise torch.OutOfMemoryError("no room")
        finally:
            raise RuntimeError("the capture was invalidated")

    with pytest.raises(RuntimeError, match="invalidated") as caught:
        capture()
    assert str(reason_of(caught.value)) == "no room"
    other = RuntimeError("something else")
    assert reason_of(other) is other

# SPDX-License-Identifier: Apache-2.0
"""A step of the optimizer that is decided on the device is one that the host decides, to the bit; as `train.cuda_graph`
captures it, but run without a capture.

The graph's work is a plain function, which takes its decisions on the device that the CPU is here. What only a capture
can get wrong is tested where there is a GPU: `test_optimizer_graph_gpu`; its kernel in `test_adamw_kernels`.
"""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch

from lora_megatron.parallel.groups import Layout, build_mesh
from lora_megatron.training import adamw_pass
from lora_megatron.training.clipping import chained, global_norm
from lora_megatron.training.cuda_graph import StepGraph
from tests.layers.test_low_rank_input_kernels import HAS_GPU, by_kernel, interpreted
from tests.pool import Pool
from tests.training.optimizer_course import BAD, CLIP, compare, contents, course, draw, make, tokens_of


@pytest.mark.parametrize("clip", [0.0, CLIP, 1e9])
def test_what_is_decided_on_the_device_is_what_the_host_decides(pool: Pool, clip: float) -> None:
    """Clipped never, in each step, and never though it is asked for."""
    assert pool.run(1, compare, layout=Layout(), clip=clip, by_name=True) == [[]]


@pytest.mark.parametrize("layout", [Layout(tensor=2, sequence=True), Layout(pipeline=2, virtual_pipeline=2)])
def test_ranks_and_chunks_have_one_norm(pool: Pool, layout: Layout) -> None:
    """No graph holds a pipeline's passes, but that of one stage may come to hold several chunks."""
    assert pool.run(2, compare, layout=layout, by_name=True) == [[], []]


def compare_without(decision: str) -> list[str]:
    decide = adamw_pass._decided_on_device

    def undecided(adamws: Any, **values: torch.Tensor) -> Any:
        return decide(adamws, **{**values, decision: torch.zeros_like(values[decision])})

    return compare(Layout(), by_name=True, broken=mock.patch.object(adamw_pass, "_decided_on_device", undecided))


def test_a_decision_that_is_left_out_would_be_noticed(pool: Pool) -> None:
    (found,) = pool.run(1, compare_without, decision="found_inf")
    assert {text.split(":")[0] for text in found} >= {f"step {step}" for step in BAD}
    assert not [text for text in found if text.startswith(("step 2:", "step 3:"))]
    (found,) = pool.run(1, compare_without, decision="lr")
    assert [text for text in found if text.startswith("step 2:")]


def graphs(**how: Any) -> list[bool]:
    """Whether the optimizer has a graph, with passes that have one and with passes that have none."""
    build_mesh(Layout(), seed=1, timeout_minutes=2)
    return [make(Layout(), graph=graph, **how)[0]._graph is not None for graph in (StepGraph(), None)]


def test_only_what_stays_in_its_place_is_captured(pool: Pool) -> None:
    assert pool.run(1, graphs) == [[True, False]]
    assert pool.run(1, graphs, precision="fp32") == [[False, False]]
    assert pool.run(1, graphs, sharding="megatron") == [[False, False]]


def after_a_load() -> list[str]:
    """What is different in the step after a load into an optimizer that has taken none."""
    build_mesh(Layout(), seed=1, timeout_minutes=2)
    (old, old_names), (new, new_names) = make(Layout()), make(Layout())
    for step in range(3):
        draw(old_names, step)
        old.step(tokens_of(step))
    copy = {name: value.clone() for name, value in old.named_state(old_names)}
    new.load_named_state(new_names, copy.__getitem__, step=3)
    for optimizer, names in ((old, old_names), (new, new_names)):
        draw(names, 3)
        optimizer.step(tokens_of(3))
    wanted, found = contents(old, old_names), contents(new, new_names)
    assert wanted.keys() == found.keys()
    return [name for name, value in wanted.items() if not torch.equal(value, found[name])]


def test_a_state_that_is_loaded_before_the_first_step_goes_on(pool: Pool) -> None:
    assert pool.run(1, after_a_load) == [[]]


def without_tokens(**how: Any) -> tuple[float, bool]:
    """The norm of a step in which no token counts, and whether what it leaves is finite."""
    build_mesh(Layout(), seed=1, timeout_minutes=2)
    optimizer, names = make(Layout(), **how)
    norm = optimizer.step(0)
    return norm, all(bool(parameter.isfinite().all()) for parameter in names)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("sharding", ["none", "megatron", "deepspeed"])
def test_no_counted_tokens_divide_by_one(pool: Pool, precision: str, sharding: str) -> None:
    assert pool.run(1, without_tokens, precision=precision, sharding=sharding) == [(0.0, True)]


def off_by_the_kernel(layout: Layout) -> list[str]:
    """Numbers of a course by the kernel that are further from the host's than torch's AdamW is from a better one."""
    build_mesh(layout, seed=1, timeout_minutes=2)
    with mock.patch.object(adamw_pass.AdamWPass, "of", return_value=None):
        want = course(layout, clip=CLIP, graph=False)
    with contextlib.ExitStack() as patches:
        for patch in () if HAS_GPU else interpreted():
            patches.enter_context(patch)
        patches.enter_context(mock.patch.object(adamw_pass, "_is_for_kernels", return_value=True))
        step = patches.enter_context(mock.patch.object(adamw_pass.kernels, "step", wraps=adamw_pass.kernels.step))
        got = course(layout, clip=CLIP, graph=False)
    assert step.call_count == len(got.norms)
    found = [f"norm {a}, not {b}" for a, b in zip(got.norms, want.norms, strict=True) if not same(a, b)]
    for number, (mine, its) in enumerate(zip(got.states, want.states, strict=True)):
        assert mine.keys() == its.keys()
        bounds = {name: 2**-8 if name.endswith(".parameter") else 2e-5 for name in its}  # bf16 may fall the other way
        off = {name: float((mine[name].double() - value.double()).abs().max()) for name, value in its.items()}
        most = {name: bounds[name] * float(value.double().abs().max()) + 1e-12 for name, value in its.items()}
        found += [f"step {number}: {name}" for name in its if not off[name] <= most[name]]
    return found


def same(one: float, other: float) -> bool:
    return one == pytest.approx(other, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("layout", [pytest.param(Layout(), marks=by_kernel)])
def test_the_kernel_takes_the_hosts_steps(request: Any, layout: Layout) -> None:
    """To what torch's AdamW is off by; through norms that are not finite and a load."""
    pool = request.getfixturevalue("nccl" if HAS_GPU else "pool")
    assert pool.run(1, off_by_the_kernel, layout=layout) == [[]]


def places() -> tuple[list[int], list[int]]:
    """Addresses of all that the state consists of, before and after one is loaded."""
    build_mesh(Layout(), seed=1, timeout_minutes=2)
    optimizer, names = make(Layout())
    draw(names, 0)
    optimizer.step(1)

    def addresses() -> list[int]:
        states = [each.optimizer.state for each in optimizer._optimizers()]
        return [t.data_ptr() for state in states for p, kinds in state.items() for t in (p, *kinds.values())]

    before, copy = addresses(), {name: value.clone() for name, value in optimizer.named_state(names)}
    optimizer.load_named_state(names, copy.__getitem__, step=5)
    optimizer.refresh_master()
    return before, addresses()


def test_a_loaded_state_lies_where_the_old_one_lay(pool: Pool) -> None:
    ((before, after),) = pool.run(1, places)
    assert before
    assert before == after


def norms(layout: Layout) -> tuple[float, float]:
    build_mesh(layout, seed=1, timeout_minutes=2)
    optimizer, names = make(layout)
    draw(names, 0)
    optimizer.inner.prepare_grads()
    return float(global_norm(chained(optimizer.inner))), optimizer.inner.get_grad_norm()


@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(pipeline=2)])
def test_the_norm_is_megatron_cores(pool: Pool, layout: Layout) -> None:
    """Which adds up squares in float32, in an order of its own."""
    (mine, theirs), other = pool.run(2, norms, layout=layout)
    assert mine == pytest.approx(theirs, rel=1e-5)
    assert other == (mine, theirs)

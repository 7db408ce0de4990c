# SPDX-License-Identifier: Apache-2.0
"""Steps of an optimizer on gradients that are drawn: norms that are not finite, a state that is loaded, a graph that is
released; once eagerly, and once as `train.cuda_graph` has them.

On a CPU, where nothing is captured, what is decided on the device is run again for each launch, and compared with steps
that the host decides."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn

from lora_megatron.config import OptimizerSection
from lora_megatron.model.names import named_parameters
from lora_megatron.parallel.groups import Layout, build_mesh
from lora_megatron.training import optimizer_graph
from lora_megatron.training.adamw_pass import AdamWPass
from lora_megatron.training.choose_optimizer import choose_optimizer
from lora_megatron.training.cuda_graph import WARM_UP_STEPS, StepGraph
from lora_megatron.training.optimizer import MegatronAdamW, trained, wrap_ddp
from tests.twin import Experiment, build_chunks

STEPS, BAD, LOADED, RELEASED = 11, {4: 1e38, 5: math.nan}, 6, 7
"""One gradient of a step in BAD is filled with that: each is finite in the first of them, and their squares are not."""
CAPTURED = [step >= WARM_UP_STEPS and not RELEASED < step <= RELEASED + WARM_UP_STEPS for step in range(STEPS)]
CLIP = 1.0
"""Below every norm of a step."""
Values = dict[str, Tensor]


@dataclass
class Course:
    """What each step left."""

    norms: list[float] = field(default_factory=list)
    states: list[Values] = field(default_factory=list)
    """Parameters, masters, moments, step counts and learning rates, by name, on the CPU."""
    captured: list[bool] = field(default_factory=list)
    """Whether the step was one of the graph's."""


class _RunAgain:
    """A graph that runs its work again in each launch."""

    def __init__(self, work: Callable[[], Tensor], norm: Tensor) -> None:
        self._work, self._norm = work, norm

    def replay(self) -> None:
        self._norm.copy_(self._work())


def record_by_name(work: Callable[[], Tensor]) -> tuple[_RunAgain, Tensor]:
    """In place of `cuda_graph.record`, which does not run its work either."""
    norm = torch.full((), math.nan, dtype=torch.float64)
    return _RunAgain(work, norm), norm


def contents(optimizer: MegatronAdamW, names: dict[nn.Parameter, str]) -> Values:
    found: Values = dict(optimizer.named_state(names))
    for parameter, name in names.items():
        found[f"{name}.parameter"] = parameter.detach()
    for place, each in enumerate(optimizer._optimizers()):
        adamw = each.optimizer
        assert not hasattr(adamw, "found_inf")
        for group in adamw.param_groups:
            assert not group["capturable"]
            found[f"{place}.lr"] = torch.tensor(group["lr"], dtype=torch.float64)
            counts = [adamw.state.get(p, {}).get("step", torch.zeros(())) for p in group["params"]]
            found |= {f"{place}.{index}.step": count for index, count in enumerate(counts)}
    return {name: value.cpu().clone() for name, value in found.items()}


def make(
    layout: Layout,
    *,
    clip: float = CLIP,
    graph: StepGraph | None = None,
    precision: str = "bf16",
    sharding: Literal["none", "megatron", "deepspeed"] = "none",
) -> tuple[Any, Any]:
    """(optimizer, names of what it trains)"""
    chunks, _ = build_chunks(Experiment(precision=precision, layout=layout))
    ddp = wrap_ddp(chunks, sharding=sharding, precision=precision)
    section = OptimizerSection(lr=1e-3, clip_grad=clip, weight_decay=0.1, sharding=sharding)
    optimizer = choose_optimizer(ddp, section, precision=precision, graph=graph)
    optimizer.refresh_master()
    return optimizer, trained([*named_parameters(chunks)])


def tokens_of(step: int) -> int:
    return 3 + step


def draw(names: dict[nn.Parameter, str], step: int) -> None:
    """Gradients where the passes leave them, sums over `tokens_of(step)`; a standard deviation of its own for each."""
    generator = torch.Generator().manual_seed(100 * step + torch.distributed.get_rank())
    for parameter in names:
        gradient = torch.randn(parameter.shape, generator=generator) * 0.3 * (1 + step) * tokens_of(step)
        parameter.main_grad.copy_(gradient)  # type: ignore[attr-defined]
    if step in BAD:
        next(iter(names)).main_grad.fill_(BAD[step])  # type: ignore[attr-defined]


def course(layout: Layout, *, clip: float, graph: bool, load: Any = MegatronAdamW.load_named_state) -> Course:
    """STEPS steps; the state after step LOADED is that of before it, loaded by `load`; the graph is released after step
    RELEASED. Learning rates are no float32s."""
    passes = StepGraph() if graph else None
    optimizer, names = make(layout, clip=clip, graph=passes)
    taken = Course()
    for step in range(STEPS):
        before = dict(optimizer.named_state(names)) if step == LOADED else {}
        optimizer.set_lr(1e-2 / (step + 1))
        optimizer.zero_grad()
        draw(names, step)
        taken.norms.append(optimizer.step(tokens_of(step)))
        taken.captured.append(optimizer._graph is not None and optimizer._graph._captured is not None)
        taken.states.append(contents(optimizer, names))
        if step == LOADED:
            load(optimizer, names, before.__getitem__, step=LOADED - len(BAD))
        if step == RELEASED and passes is not None:
            passes.release()
    return taken


def complaints(got: Course, want: Course) -> list[str]:
    """Every number and tensor that is not the same to the bit; one that is not a number is equal to itself."""
    found = []
    for step, (mine, its) in enumerate(zip(got.states, want.states, strict=True)):
        norm, other = got.norms[step], want.norms[step]
        if norm != other and not (math.isnan(norm) and math.isnan(other)):
            found.append(f"step {step}: norm {norm!r}, not {other!r}")
        assert mine.keys() == its.keys()
        differ = [name for name in mine if not torch.equal(mine[name].nan_to_num(7.0), its[name].nan_to_num(7.0))]
        found += [f"step {step}: {name}" for name in differ]
    return found


def changes(taken: Course) -> list[bool]:
    """Whether each step from the second on changed anything but learning rates."""
    kept = [{k: v for k, v in state.items() if not k.endswith(".lr")} for state in taken.states]
    return [any(not torch.equal(v, old[k]) for k, v in new.items()) for old, new in itertools.pairwise(kept)]


def compare(layout: Layout, *, clip: float = CLIP, by_name: bool = False, broken: Any = None, **how: Any) -> list[str]:
    """What is wrong with the graph's course on this rank; `by_name`: with its work run again, and no graph, against
    steps that the host decides. broken: a context for the graph's course."""
    build_mesh(layout, seed=1, timeout_minutes=2)
    with mock.patch.object(AdamWPass, "of", return_value=None) if by_name else contextlib.nullcontext():
        want = course(layout, clip=clip, graph=False)
    patched = mock.patch.object(optimizer_graph, "record", record_by_name) if by_name else contextlib.nullcontext()
    with patched, broken or contextlib.nullcontext():
        got = course(layout, clip=clip, graph=True, **how)
    assert (want.captured, got.captured) == ([False] * STEPS, CAPTURED)
    assert [math.isfinite(norm) for norm in want.norms] == [step not in BAD for step in range(STEPS)]
    assert min(filter(math.isfinite, want.norms)) > CLIP, "clipping is active"
    assert changes(want) == [step not in BAD for step in range(1, STEPS)]
    return complaints(got, want)

# SPDX-License-Identifier: Apache-2.0
"""ZeRO over two gloo ranks against torch.optim.AdamW on the same reduced gradients in one piece."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import Parameter

from lora_megatron.errors import CheckpointError, ConfigError
from lora_megatron.training.deepspeed_zero import DTYPE_OF, DeepSpeedZero

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

WORLD = 2
LR, BETAS, EPS, CLIP = 3e-2, (0.9, 0.95), 1e-8, 1.0
TOKENS = 7
# a, b, c: 34 elements, padded to 36, so the cut at 18 falls inside b; scale: one element, so rank 1 has only padding.
SHAPES = {"a": (3, 5), "b": (7,), "c": (4, 3), "scale": (1,)}
DECAYS = (0.1, 0.0)
GRADIENT_SCALES = (0.01, 2.0, 0.5, 0.02)  # below and above the clipping threshold
# Adam divides by sqrt(v): one ulp of difference in the clipping factor moves a step by some ulps of the parameter.
TOLERANCE = {"rtol": 0.0, "atol": 5e-7}


def make_parameters(precision: str) -> dict[str, Parameter]:
    """The same four parameters on every rank, with a zero main_grad as megatron's DDP would attach."""
    generator = torch.Generator().manual_seed(1)
    parameters = {}
    for name, shape in SHAPES.items():
        parameters[name] = Parameter(torch.randn(shape, generator=generator).to(DTYPE_OF[precision]))
        parameters[name].main_grad = torch.zeros(shape)
    return parameters


def make_zero(parameters: dict[str, Parameter], precision: str, stage: int, data_parallel_group=None) -> DeepSpeedZero:
    *first, last = parameters.values()
    return DeepSpeedZero(
        [{"params": first, "weight_decay": DECAYS[0]}, {"params": [], "weight_decay": 9.0}, {"params": [last]}],
        lr=LR,
        betas=BETAS,
        eps=EPS,
        weight_decay=DECAYS[1],
        clip_grad=CLIP,
        stage=stage,
        data_parallel_group=data_parallel_group or dist.group.WORLD,
        model_parallel_group=None,
        is_model_parallel_duplicate=lambda parameter: False,
        precision=precision,
    )


def backward_and_reduce(parameters: dict[str, Parameter], step: int) -> None:
    """What the passes do before a step: a real backward with different data per rank, then TOKENS times the mean over
    ranks in main_grad."""
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    weights = [torch.randn(p.shape, generator=generator) * GRADIENT_SCALES[step - 1] for p in parameters.values()]
    sum((p.float() * w).sum() for p, w in zip(parameters.values(), weights, strict=True)).backward()
    for parameter in parameters.values():
        parameter.main_grad.copy_(parameter.grad)
        dist.all_reduce(parameter.main_grad)
        parameter.main_grad.mul_(TOKENS / dist.get_world_size())


def train(zero: DeepSpeedZero, parameters: dict[str, Parameter], steps: range) -> list[float]:
    norms = []
    for step in steps:
        zero.set_lr(LR / step)
        zero.zero_grad()
        backward_and_reduce(parameters, step)
        norms.append(zero.step(TOKENS))
    return norms


def train_reference(precision: str, steps: range) -> tuple[dict[str, Parameter], torch.optim.AdamW, list[float]]:
    """The unsharded twin: fp32 masters of the rounded start, fed the gradients of `backward_and_reduce`."""
    parameters = make_parameters(precision)
    masters = {name: Parameter(parameter.detach().float()) for name, parameter in parameters.items()}
    *first, last = masters.values()
    groups = [{"params": first, "weight_decay": DECAYS[0]}, {"params": [last], "weight_decay": DECAYS[1]}]
    adamw, norms = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS), []
    for step in steps:
        for parameter in parameters.values():
            parameter.grad = None
        backward_and_reduce(parameters, step)
        for name, master in masters.items():
            master.grad = parameters[name].main_grad / TOKENS
        for group in adamw.param_groups:
            group["lr"] = LR / step
        norms.append(torch.nn.utils.clip_grad_norm_(list(masters.values()), CLIP).item())
        adamw.step()
    return masters, adamw, norms


def names_of(parameters: dict[str, Parameter]) -> dict[Parameter, str]:
    return {parameter: name for name, parameter in parameters.items()}


def check_equals_adamw(precision: str, stage: int) -> None:
    parameters = make_parameters(precision)
    zero = make_zero(parameters, precision, stage)
    norms = train(zero, parameters, range(1, 5))
    masters, adamw, reference_norms = train_reference(precision, range(1, 5))
    assert min(reference_norms) < CLIP < max(reference_norms), "the test must clip some steps and not others"
    assert norms == pytest.approx(reference_norms, rel=1e-6)
    state = dict(zero.named_state(names_of(parameters)))
    assert set(state) == {f"{name}.{kind}" for name in SHAPES for kind in ("master", "exp_avg", "exp_avg_sq")}
    for name, master in masters.items():
        torch.testing.assert_close(state[f"{name}.master"], master.detach(), **TOLERANCE)
        for kind in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[f"{name}.{kind}"], adamw.state[master][kind], **TOLERANCE)
        assert torch.equal(parameters[name].detach(), state[f"{name}.master"].to(DTYPE_OF[precision]))


def check_state_is_sharded(stage: int) -> None:
    parameters = make_parameters("bf16")
    zero = make_zero(parameters, "bf16", stage)
    whole = sum(tensor.numel() for tensor in dict(zero.named_state(names_of(parameters))).values())
    held = zero.state_bytes() / 4
    alignment = 3 * 2 * 2  # three kinds, two groups, at most two elements of padding per rank
    assert whole / WORLD <= held <= whole / WORLD + alignment
    assert 2 * held < 1.3 * whole, "the padding must not blur the claim"


def check_resume_is_bit_identical(precision: str, stage: int) -> None:
    straight = make_parameters(precision)
    straight_zero = make_zero(straight, precision, stage)
    train(straight_zero, straight, range(1, 3))
    saved, step_count = dict(straight_zero.named_state(names_of(straight))), straight_zero.step_count
    assert step_count == 2
    straight_norms = train(straight_zero, straight, range(3, 5))
    expected = dict(straight_zero.named_state(names_of(straight)))

    alone = [dist.new_group([rank]) for rank in range(WORLD)][dist.get_rank()]
    for data_parallel_group in (dist.group.WORLD, alone):
        resumed = make_parameters(precision)
        for parameter in resumed.values():
            parameter.data.fill_(7.0)  # so that only what is loaded can be right
        zero = make_zero(resumed, precision, stage, data_parallel_group)
        zero.load_named_state(names_of(resumed), saved.__getitem__, step_count)
        for name, parameter in resumed.items():  # before any step, which would repair a stale parameter
            assert torch.equal(parameter, saved[f"{name}.master"].to(DTYPE_OF[precision]))
        assert train(zero, resumed, range(3, 5)) == straight_norms
        assert zero.step_count == 4
        state = dict(zero.named_state(names_of(resumed)))
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        assert all(torch.equal(resumed[name], straight[name]) for name in SHAPES)

    straight["b"].data.fill_(0.5)
    straight_zero.refresh_master()
    assert torch.equal(dict(straight_zero.named_state(names_of(straight)))["b.master"], torch.full(SHAPES["b"], 0.5))

    transposed: dict[str, Tensor] = {**saved, "a.master": saved["a.master"].t()}
    with pytest.raises(CheckpointError, match=r"a\.master is torch\.float32 \[5, 3\], not torch\.float32 \[3, 5\]"):
        straight_zero.load_named_state(names_of(straight), transposed.__getitem__, 2)


def check_data_parallel(rank: int) -> None:
    for stage in (1, 2):
        check_state_is_sharded(stage)
        for precision in ("fp32", "bf16"):
            check_equals_adamw(precision, stage)
            check_resume_is_bit_identical(precision, stage)


def check_model_parallel(rank: int) -> None:
    """Two model-parallel ranks, no data parallelism: a replicated parameter counts once, an empty stage takes part."""
    alone = [dist.new_group([member]) for member in range(WORLD)][rank]

    def make(parameters: list[Parameter], duplicates: set[Parameter]) -> DeepSpeedZero:
        return DeepSpeedZero(
            [{"params": parameters, "weight_decay": 0.0}],
            lr=LR,
            betas=BETAS,
            eps=EPS,
            weight_decay=0.0,
            clip_grad=CLIP,
            stage=2,
            data_parallel_group=alone,
            model_parallel_group=dist.group.WORLD,
            is_model_parallel_duplicate=duplicates.__contains__,
            precision="fp32",
        )

    sharded, replicated = Parameter(torch.ones(4)), Parameter(torch.ones(9))
    sharded.main_grad, replicated.main_grad = torch.full((4,), float(rank + 1)), torch.ones(9)
    zero = make([sharded, replicated], {replicated} if rank == 1 else set())
    assert zero.step(2) == pytest.approx(math.sqrt(4 * 1 + 4 * 4 + 9) / 2)

    before = sharded.detach().clone()
    zero = make([sharded] if rank == 0 else [], set())
    sharded.main_grad.fill_(1.0)
    assert zero.step(1) == pytest.approx(2.0)
    assert torch.equal(sharded, before) == (rank == 1), "a stage that trains nothing changes nothing"
    zero.zero_grad()
    zero.set_lr(0.1)
    assert len(dict(zero.named_state({sharded: "s"}))) == (3 if rank == 0 else 0)
    empty_state = dict(zero.named_state({sharded: "s"}))
    zero.load_named_state({sharded: "s"}, empty_state.__getitem__, 5)
    assert zero.step_count == 5

    before = sharded.detach().clone()
    if rank == 0:
        sharded.main_grad[2] = float("nan")
    assert math.isnan(zero.step(1))
    assert torch.equal(sharded, before)
    assert zero.step_count == 5


def run_rank(rank: int, rendezvous: str, check_name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD)
    try:
        globals()[check_name](rank)
    finally:
        dist.destroy_process_group()


@needs_deepspeed
@pytest.mark.timeout(120)
@pytest.mark.parametrize("check", [check_data_parallel, check_model_parallel], ids=lambda check: check.__name__)
def test_two_ranks(tmp_path: Path, check) -> None:
    mp.spawn(run_rank, args=(f"file://{tmp_path / 'rendezvous'}", check.__name__), nprocs=WORLD)


def test_missing_deepspeed_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"pip install 'lora-megatron\[deepspeed\]'"):
        make_zero(make_parameters("fp32"), "fp32", 1, data_parallel_group=object())


def test_stage_three_is_refused() -> None:
    with pytest.raises(ConfigError, match="ZeRO stage 3"):
        make_zero(make_parameters("fp32"), "fp32", 3, data_parallel_group=object())

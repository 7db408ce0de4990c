# SPDX-License-Identifier: Apache-2.0
"""After a step bf16 parameters are their fp32 masters, rounded, all by one operation."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from lora_megatron.config import OptimizerSection
from lora_megatron.model.names import named_parameters
from lora_megatron.parallel.groups import build_mesh
from lora_megatron.training.choose_optimizer import choose_optimizer
from lora_megatron.training.optimizer import MegatronAdamW, trained, wrap_ddp
from lora_megatron.training.step import run_microbatches
from tests.pool import Pool
from tests.twin import Experiment, build_chunks, microbatch


def step_once() -> tuple[int, list[str], float]:
    """(calls of the one operation, parameters that are not their masters, how far the parameters moved)"""
    experiment = Experiment(precision="bf16")
    build_mesh(experiment.layout, seed=1, timeout_minutes=2)
    chunks, _ = build_chunks(experiment)
    ddp = wrap_ddp(chunks, sharding="none", precision="bf16")
    optimizer = choose_optimizer(ddp, OptimizerSection(lr=1e-2), precision="bf16")
    assert isinstance(optimizer, MegatronAdamW)
    names = trained(named_parameters(chunks))
    before = {parameter: parameter.detach().clone() for parameter in names}
    loss = run_microbatches(ddp, [microbatch(experiment, 0)])
    calls = mock.Mock(side_effect=torch._foreach_copy_)
    with mock.patch.object(torch, "_foreach_copy_", calls):
        optimizer.step(loss.tokens)
    masters: dict[str, Any] = dict(optimizer.named_state(names))
    off = [name for p, name in names.items() if not torch.equal(p, masters[f"{name}.master"].bfloat16())]
    return calls.call_count, off, max(float((p - old).abs().max()) for p, old in before.items())


def test_masters_are_copied_at_once(pool: Pool) -> None:
    calls, off, moved = pool.run(1, step_once)[0]
    assert calls == 1
    assert off == []
    assert moved > 1e-3

# SPDX-License-Identifier: Apache-2.0
"""Five AdamW steps on a Hugging Face base equal PEFT's: every loss and every weight of the adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lora_megatron.checkpoint.adapter import describe_method, load_adapter, save_adapter
from lora_megatron.checkpoint.adapter_reader import AdapterReader
from lora_megatron.config import OptimizerSection
from lora_megatron.huggingface.base import describe_hf_base
from lora_megatron.huggingface.peft_export import PREFIX, export_adapter
from lora_megatron.model.build import BuildOptions, build
from lora_megatron.parallel.groups import Layout, build_mesh
from lora_megatron.training.choose_optimizer import choose_optimizer
from lora_megatron.training.optimizer import wrap_ddp
from lora_megatron.training.step import run_microbatches
from tests.huggingface.adapters import make_adapter
from tests.huggingface.models import FAMILIES, LENGTH, model_class, tokens
from tests.pool import Pool

STEPS, BATCH = 5, 4
OPTIMIZER: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.1, "betas": (0.9, 0.98), "eps": 1e-6}
# One rank for q, k and v: where they are one matrix PEFT has one scale for the three.
TARGETS = {"q-v": {"q": 4, "v": 4}, "all": {"q": 4, "k": 4, "v": 4, "o": 1, "fc1": 2, "fc2": 5}}
LAYOUTS = {"one": (1, Layout()), "tp2-sp-pp2": (4, Layout(tensor=2, pipeline=2, sequence=True))}


def batch_of(step: int) -> Tensor:
    """[BATCH, LENGTH + 1] token ids of a step."""
    return tokens(BATCH, LENGTH + 1, seed=100 + step)


def train_ours(base: Path, adapter: Path, out: Path, layout: Layout) -> list[float]:
    """On every rank: the losses; the trained adapter is saved as `out`."""
    build_mesh(layout, seed=1)
    described = describe_hf_base(base)
    with AdapterReader(adapter, described.shape) as reader:
        method = reader.method
    assert method is not None
    chunks = build(described.shape, method, layout, BuildOptions())
    described.load(chunks)
    load_adapter(adapter, chunks, method, described.shape, base_fingerprint=described.fingerprint)
    ddp = wrap_ddp(chunks, sharding="none", precision="fp32")
    optimizer = choose_optimizer(ddp, OptimizerSection(**OPTIMIZER, clip_grad=1.0), precision="fp32")
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        rows = [batch_of(step)[i : i + 2] for i in range(0, BATCH, 2)]
        loss = run_microbatches(ddp, [microbatch(ids) for ids in rows])
        losses.append(loss.mean)
        optimizer.step(loss.tokens)
    facts = {"base": str(base), "base_fingerprint": described.fingerprint, "seed": 0}
    save_adapter(out, chunks, method, described.shape, {**facts, **describe_method(method, described.shape)})
    return losses


def microbatch(ids: Tensor) -> dict[str, Any]:
    positions = torch.arange(LENGTH).expand(len(ids), LENGTH)
    return {
        "tokens": ids[:, :-1],
        "labels": ids[:, 1:],
        "loss_mask": torch.ones(len(ids), LENGTH),
        "position_ids": positions,
        "attention_mask": None,
        "first_sample": 0,
    }


def train_peft(base: Path, name: str, adapter: Path) -> tuple[list[float], dict[str, Tensor]]:
    """The losses and the trained factors, by PEFT and torch; zero blocks of a stacked B are held at zero."""
    import peft

    model = model_class(name).from_pretrained(base, attn_implementation="eager")
    adapted = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
    trained = {key: p for key, p in adapted.named_parameters() if p.requires_grad}
    blocks = {key: p.detach() != 0 for key, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), **OPTIMIZER)
    losses = []
    for step in range(STEPS):
        ids = batch_of(step)
        optimizer.zero_grad()
        logits = adapted(ids[:, :-1]).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        for key, parameter in trained.items():
            assert parameter.grad is not None
            parameter.grad *= blocks[key]
        torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    names = {key: key.replace(".default", "").removeprefix(PREFIX) for key in trained}
    return losses, {names[key]: parameter.detach() for key, parameter in trained.items()}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", FAMILIES)
def test_five_steps_equal_peft(
    pool: Pool, saved: Callable[[str], Path], tmp_path: Path, name: str, targets: str
) -> None:
    start = tmp_path / "start"
    pool.run(1, begin, base=saved(name), out=start, targets=TARGETS[targets])
    export_adapter(saved(name), start, tmp_path / "peft")
    their_losses, theirs = train_peft(saved(name), name, tmp_path / "peft")
    assert their_losses[-1] != their_losses[0]
    for layout, (world, cut) in LAYOUTS.items():
        end = tmp_path / layout
        losses = pool.run(world, train_ours, base=saved(name), adapter=start, out=end, layout=cut)[0]
        assert losses == pytest.approx(their_losses, abs=1e-4)
        ours = exported(saved(name), end, tmp_path / f"{layout}-peft")
        assert set(ours) == set(theirs)
        moved = exported(saved(name), start, tmp_path / f"{layout}-start")
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, rtol=0, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
            assert (tensor - moved[key]).abs().max() > 1e-3, f"{key} did not train"


def begin(base: Path, out: Path, targets: dict[str, int]) -> None:
    make_adapter(base, out, targets=targets)


def exported(base: Path, adapter: Path, out: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    export_adapter(base, adapter, out)
    return {key.removeprefix(PREFIX): value for key, value in load_file(out / "adapter_model.safetensors").items()}

# SPDX-License-Identifier: Apache-2.0
"""The experiment every parallel layout must repeat: a tiny GPT, three AdamW steps, everything gathered and compared.

`train_twin` runs inside a world of any size and returns, on rank 0, whole tensors under global names: the first
forward loss, every trained gradient of each step, the gradient norms and the parameters after each step. The
unsharded twin is the same function in a world of one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from lora_megatron.config import MethodSection, ModelSection, OptimizerSection
from lora_megatron.layers.lora import seed_from
from lora_megatron.layers.sharding import shard_of
from lora_megatron.methods.choose import choose_method
from lora_megatron.model.build import BuildOptions, build
from lora_megatron.model.initialise import initialise_base
from lora_megatron.model.names import named_parameters
from lora_megatron.model.presets import resolve_shape
from lora_megatron.parallel.groups import Layout, build_mesh
from lora_megatron.training.optimizer import trained, wrap_ddp
from lora_megatron.training.choose_optimizer import choose_optimizer
from lora_megatron.training.step import run_microbatches

VOCABULARY = 100


@dataclass(frozen=True)
class Experiment:
    layout: Layout = Layout()
    model: dict[str, Any] = field(default_factory=lambda: {"preset": "tiny", "num_layers": 4})
    method: dict[str, Any] = field(
        default_factory=lambda: {"targets": {"q": 4, "k": 1, "v": 2, "o": 3, "fc1": 2, "fc2": 5}}
    )
    # Adam divides by |g| + eps: with eps far above the rounding of g, a step is as exact as its gradient.
    optimizer: dict[str, Any] = field(
        default_factory=lambda: {"lr": 2e-3, "weight_decay": 0.1, "clip_grad": 0.5, "eps": 1e-4}
    )
    precision: str = "fp32"
    recompute: str = "none"
    dropout: float = 0.0
    steps: int = 3
    sequence_length: int = 16
    micro_batch_size: int = 1
    global_batch_size: int = 4
    packing: bool = False

    def with_layout(self, **layout: Any) -> Experiment:
        return replace(self, layout=Layout(**layout))


def microbatch(experiment: Experiment, first: int) -> dict[str, Any]:
    """Samples first .. first + b - 1 of an endless random stream, a function of the sample index alone."""
    rows = []
    for sample in range(first, first + experiment.micro_batch_size):
        generator = torch.Generator().manual_seed(seed_from("sample", sample))
        rows.append(torch.randint(0, VOCABULARY, (experiment.sequence_length + 1,), generator=generator))
    ids = torch.stack(rows)
    length = experiment.sequence_length
    mask = torch.ones(len(rows), length)
    for row, sample in enumerate(range(first, first + len(rows))):
        mask[row, : 3 + sample % 5] = 0  # a context of its own length for every sample
    attention_mask = None
    positions = torch.arange(length).expand(len(rows), length)
    if experiment.packing:
        segment = (torch.arange(length) >= length // 2).long()
        positions = (torch.arange(length) % (length // 2)).expand(len(rows), length)
        visible = (segment[:, None] == segment[None, :]) & torch.ones(length, length).tril().bool()
        attention_mask = (~visible).expand(len(rows), 1, length, length)
    return {
        "tokens": ids[:, :-1],
        "labels": ids[:, 1:],
        "loss_mask": mask,
        "position_ids": positions,
        "attention_mask": attention_mask,
        "first_sample": first,
    }


def build_chunks(experiment: Experiment) -> list[Any]:
    """Chunks with base weights and randomised B (B = 0 hides a wrong dA until the second step)."""
    mesh = build_mesh(experiment.layout, seed=1)
    shape = resolve_shape(ModelSection(**experiment.model), tokenizer_vocab_size=VOCABULARY)
    method = choose_method(MethodSection(**experiment.method), num_layers=shape.num_layers)
    options = BuildOptions(experiment.precision, experiment.recompute, experiment.dropout, adapter_seed=7)
    chunks = build(shape, method, experiment.layout, options)
    initialise_base(chunks, seed=3, num_layers=shape.num_layers)
    rank, size = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
    with torch.no_grad():
        for named in named_parameters(chunks):
            if named.name.endswith("lora_B") or named.name.endswith(".bias"):
                shard = shard_of(named.parameter)
                full_shape = shard.full_shape(named.parameter.shape, size)
                generator = torch.Generator().manual_seed(seed_from("B", named.name))
                full = torch.randn(full_shape, generator=generator) * 0.1
                named.parameter.copy_(shard.part(full, full_shape, rank, size))
    assert mesh.tensor == rank
    return chunks


def gather(chunks: list[Any], what: str) -> dict[str, torch.Tensor] | None:
    """Whole trained tensors (`value` or `grad`) under global names on rank 0, None elsewhere."""
    mine: dict[str, torch.Tensor] = {}
    group = mpu.get_tensor_model_parallel_group()
    for named in named_parameters(chunks):
        if not named.parameter.requires_grad:
            continue
        value = named.parameter.detach() if what == "value" else named.parameter.main_grad
        parts = [torch.empty_like(value) for _ in range(group.size())]
        dist.all_gather(parts, value.contiguous(), group=group)
        shard = shard_of(named.parameter)
        if shard.axis is None:
            for part in parts[1:]:
                torch.testing.assert_close(part, parts[0], rtol=1e-6, atol=1e-9, msg=f"{named.name} not replicated")
        full = shard.join(parts).float().cpu().clone()
        if named.is_copy:
            name = f"{named.name} (copy)"
        else:
            name = named.name
        mine[name] = full
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    merged = {name: tensor for rank in everyone for name, tensor in rank.items()}
    return merged if dist.get_rank() == 0 else None


def train_twin(experiment: Experiment) -> dict[str, Any] | None:
    chunks = build_chunks(experiment)
    section = OptimizerSection(**experiment.optimizer)
    ddp = wrap_ddp(chunks, sharding=section.sharding, precision=experiment.precision)
    optimizer = choose_optimizer(ddp, section, precision=experiment.precision)
    optimizer.refresh_master()
    data_rank, data_size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    b = experiment.micro_batch_size
    record: dict[str, Any] = {"loss": [], "norm": [], "grads": [], "values": []}
    for step in range(experiment.steps):
        first = step * experiment.global_batch_size
        count = experiment.global_batch_size // (b * data_size)
        batches = [microbatch(experiment, first + (m * data_size + data_rank) * b) for m in range(count)]
        optimizer.zero_grad()
        loss = run_microbatches(ddp, batches)
        if section.sharding != "megatron":  # reduce-scattered gradients are whole on no rank
            record["grads"].append(gather(chunks, "grad"))
        record["loss"].append(loss.mean)
        optimizer.set_lr(section.lr)
        record["norm"].append(optimizer.step())
        record["values"].append(gather(chunks, "value"))
    assert trained(list(named_parameters(chunks))) or experiment.layout.pipeline > 1
    return record if dist.get_rank() == 0 else None


def compare(got: dict[str, Any], want: dict[str, Any], *, tolerance: float = 1e-4) -> int:
    """Assert equality up to the rounding of sums taken in another order; return how many tensors were compared.

    A tensor's error is measured against its own largest value: a sum over ranks rounds relative to its terms.
    """
    compared = 0
    torch.testing.assert_close(torch.tensor(got["loss"]), torch.tensor(want["loss"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(got["norm"]), torch.tensor(want["norm"]), rtol=1e-4, atol=1e-7)
    for kind in ("grads", "values"):
        for step, (g, w) in enumerate(zip(got[kind], want[kind], strict=False)):
            names = {name.removesuffix(" (copy)") for name in g}
            assert names == set(w), f"{kind}: other parameters: {names ^ set(w)}"
            for name, tensor in g.items():
                reference = w[name.removesuffix(" (copy)")]
                error, scale = float((tensor - reference).abs().max()), float(reference.abs().max())
                assert error <= tolerance * scale + 1e-8, f"{kind}, step {step}, {name}: off by {error} of {scale}"
                compared += 1
    return compared

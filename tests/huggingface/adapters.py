# SPDX-License-Identifier: Apache-2.0
"""Adapters of a Hugging Face base as a run saves them, without the run. Call these inside a world (the `pool`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from torch import nn

from lora_megatron.checkpoint.adapter import describe_method, save_adapter, trained_parameters
from lora_megatron.config import MethodSection
from lora_megatron.huggingface.base import describe_hf_base
from lora_megatron.layers.lora import seed_from
from lora_megatron.layers.sharding import shard_of
from lora_megatron.methods.choose import choose_method
from lora_megatron.model.build import BuildOptions, build
from lora_megatron.parallel.groups import Layout, build_mesh, join_world

ALL_TARGETS = {"q": 4, "k": 2, "v": 3, "o": 1, "fc1": 2, "fc2": 5}


def make_adapter(
    base_folder: Path,
    out: Path,
    *,
    targets: dict[str, int] | None = None,
    alpha: float = 6.0,
    seed: int = 3,
    randomise: bool = True,
    layout: Layout | None = None,
    precision: str = "fp32",
    **method: Any,
) -> Sequence[nn.Module]:
    """Save an adapter of every projection (or of `targets`) as `out`; this rank's chunks, with it and the base loaded.

    B is random, other trained parameters are moved a little; `randomise` off leaves B at zero and the others the
    base's. `method` are further keys of the method section. Every layout draws the same values.
    """
    join_world()
    layout = layout or Layout()
    if not mpu.model_parallel_is_initialized():
        build_mesh(layout, seed=seed)
    base = describe_hf_base(base_folder)
    section = {"targets": ALL_TARGETS if targets is None else targets, "alpha": alpha, **method}
    chosen = choose_method(MethodSection(**section), num_layers=base.shape.num_layers)
    chunks = build(base.shape, chosen, layout, BuildOptions(precision, adapter_seed=seed))
    base.load(chunks)
    if randomise:
        _randomise(chunks, seed)
    facts = {"base": str(base_folder), "base_fingerprint": base.fingerprint, "seed": seed}
    save_adapter(out, chunks, chosen, base.shape, {**facts, **describe_method(chosen, base.shape)})
    return chunks


def _randomise(chunks: Sequence[nn.Module], seed: int) -> None:
    rank, size = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
    for named in trained_parameters(chunks, copies=True):
        if not named.name.endswith("lora_A"):
            shard = shard_of(named.parameter)
            shape = shard.full_shape(named.parameter.shape, size)
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed_from(seed, named.name))) * 0.1
            with torch.no_grad():
                named.parameter.add_(shard.part(noise, shape, rank, size))

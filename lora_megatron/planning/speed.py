# SPDX-License-Identifier: Apache-2.0
"""The expected speed: an estimate from FLOPs, bytes and data sheets, with one assumption about efficiency.

A stage's time for a microbatch is the longer of its products at `EFFICIENCY` of the dense peak and of reading its
weights once a pass; tensor parallelism adds its all-reduces, which are not overlapped (two a layer in each pass), and
the pipeline one message each way. With m microbatches, p stages and v chunks a stage, the slowest stage sets

    step = (m + (p - 1) / v) x stage        the bubble is (p - 1) / (m v) of the work (arXiv 2104.04473, section 2.2)

Products count at the rate of `train.precision`, those of FP8 linear layers too (a guess on the safe side); an output
layer in FP8 (`base.head`), which is the last stage's alone, at that of FP8, where the GPU has one.

Data parallelism adds the reduction of the gradients. Data loading, launches and the optimizer are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_megatron.config import Config
from lora_megatron.methods.method import Method
from lora_megatron.model.checks import layout_of
from lora_megatron.model.recomputation import rebuilt_layers, rebuilt_mlps
from lora_megatron.model.shape import ModelShape
from lora_megatron.planning.flops import head_flops, stage_flops
from lora_megatron.planning.gpus import NODE, Gpu
from lora_megatron.planning.memory import MemoryPlan
from lora_megatron.planning.stages import chunk_layers, microbatch_of

EFFICIENCY = 0.5
"""Share of the dense peak that products reach. Checked against what was measured elsewhere: the LoRA paper's 43.1
tokens/s per V100, and 0.58 to 0.65 in rough trials of GPT-3's layers on an H200."""
LINK_EFFICIENCY = 0.65
"""Share of a link's data sheet that collectives reach: 292 of 450 GB/s between two H200."""


@dataclass(frozen=True)
class Speed:
    """An estimate of one optimizer step."""

    step_seconds: float
    tokens_per_second: float
    tokens_per_second_per_gpu: float
    model_tflops_per_gpu: float
    hardware_tflops_per_gpu: float
    bubble: float
    """Share of a step that a stage waits for the pipeline."""


def estimate_speed(
    config: Config, shape: ModelShape, method: Method, ranks: Sequence[MemoryPlan], *, gpu: Gpu, world_size: int
) -> Speed:
    """`ranks` are the plans of the stages in order; world_size GPUs train together."""
    layout = layout_of(config)
    data_size = world_size // layout.model_size
    count = config.data.global_batch_size // (config.data.micro_batch_size * data_size)
    flops = [stage_flops(config, shape, method, stage) for stage in range(layout.pipeline)]
    weighed = [f.hardware for f in flops]
    weighed[-1] -= _saved_by_fp8_head(config, shape, method, gpu)
    stage_seconds = max(
        _microbatch_seconds(config, shape, executed, plan, gpu, world_size)
        for executed, plan in zip(weighed, ranks, strict=True)
    )
    waiting = (layout.pipeline - 1) / layout.virtual_pipeline
    reduction = max(plan.gradients for plan in ranks)
    seconds = (count + waiting) * stage_seconds + _all_reduce(reduction, data_size, _bandwidth(gpu, world_size))
    tokens = config.data.global_batch_size * config.data.sequence_length
    rate = tokens / seconds
    return Speed(
        step_seconds=seconds,
        tokens_per_second=rate,
        tokens_per_second_per_gpu=rate / world_size,
        model_tflops_per_gpu=rate / world_size * sum(f.model for f in flops) / 1e12,
        hardware_tflops_per_gpu=rate / world_size * sum(f.hardware for f in flops) / 1e12,
        bubble=waiting / (count + waiting),
    )


def _microbatch_seconds(
    config: Config, shape: ModelShape, flops_per_token: float, plan: MemoryPlan, gpu: Gpu, world_size: int
) -> float:
    """One microbatch forward and backward through one stage."""
    layout, batch = layout_of(config), microbatch_of(config, shape)
    peak = gpu.tflops_16bit if config.train.precision == "bf16" else gpu.tflops_fp32
    products = flops_per_token * batch.tokens / layout.tensor / (peak * 1e12 * EFFICIENCY)
    layers = chunk_layers(config, shape)
    passes = 2 + rebuilt_layers(batch.recompute, batch.recompute_layers, layers) / layers  # forward again, and dgrad
    mlps = rebuilt_mlps(batch.recompute, batch.recompute_modules, batch.recompute_layers, layers) / layers
    reading = ((passes + mlps * _share_of_fc1(shape)) * plan.weights + plan.gradients) / (gpu.bandwidth_gbs * 1e9)
    whole_hidden = batch.hidden_bytes * batch.sharded
    gathered = mlps / 2 if layout.sequence else 0.0  # fc1's input once more, which is half an all-reduce
    reductions = (2 * passes + gathered) * shape.num_layers / layout.pipeline
    tensor = reductions * _all_reduce(
        whole_hidden, layout.tensor, gpu.link_gbs if layout.tensor <= NODE else gpu.network_gbs
    )
    messages = 2 * layout.virtual_pipeline if layout.pipeline > 1 else 0
    return max(products, reading) + tensor + messages * batch.hidden_bytes / (_bandwidth(gpu, world_size) * 1e9)


def _saved_by_fp8_head(config: Config, shape: ModelShape, method: Method, gpu: Gpu) -> float:
    """FLOPs per token in 16 bits that would take as long as what FP8 saves of the output layer's products."""
    if config.base.head != "fp8" or config.train.precision != "bf16" or gpu.tflops_fp8 is None:
        return 0.0
    return head_flops(config, shape, method).hardware * (1 - gpu.tflops_16bit / gpu.tflops_fp8)


def _share_of_fc1(shape: ModelShape) -> float:
    """Of a layer's weights."""
    sizes = {name: math.prod(shape.projection(name)) for name in shape.projections}
    return sum(sizes.get(name, 0) for name in ("fc1", "gate", "up")) / sum(sizes.values())


def _bandwidth(gpu: Gpu, ranks: int) -> float:
    """GB/s between any two of so many ranks."""
    return gpu.link_gbs if ranks <= NODE else gpu.network_gbs


def _all_reduce(size: float, ranks: int, bandwidth_gbs: float) -> float:
    """Seconds of a ring all-reduce: 2 (n - 1) / n times the bytes over the link."""
    return 2 * (ranks - 1) / ranks * size / (bandwidth_gbs * 1e9 * LINK_EFFICIENCY)

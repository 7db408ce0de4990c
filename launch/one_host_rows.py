# SPDX-License-Identifier: Apache-2.0
"""The layouts that `launch/one_host.py` measures on N GPUs, each as the arguments of a `lora-megatron bench`.

A row says how the model is cut and how many microbatches a step has; the micro-batch is the largest power of two that
the planner fits into the memory of a GPU, up to a limit. Where the whole model fits at none, the micro-batch is 1 and
the bench measures slices and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_megatron.bench.slices import most_that_fit, unit_of
from lora_megatron.bench.workload import bench_config, method_of, slice_of
from lora_megatron.config import Config, load_config
from lora_megatron.errors import ConfigError
from lora_megatron.methods.choose import choose_method
from lora_megatron.model.checks import check_plan
from lora_megatron.model.presets import resolve_shape
from lora_megatron.model.shape import ModelShape
from lora_megatron.planning.plan import plan_method, stage_weights
from lora_megatron.planning.recompute import SHARE

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "launch/configs/gpt3_175b_8gpu.yaml"
OWNED = ("parallel.", "data.micro_batch_size", "data.global_batch_size", "base.storage", "base.gemm", "run.")
"""What rows set themselves."""
TIMEOUT = "parallel.timeout_minutes=5"
_ROOMY = 0.94
"""Of the memory that a micro-batch above 1 may fill: the allocator reserves more than the peak, and a rank without room
ends the others too. One sequence is tried where the bench itself would (`planning.recompute.SHARE`)."""
_MOST_CHUNKS = 12
"""Of the interleaved schedule. Its bubble is (P - 1) / (m v) of a step; each chunk costs a transfer more."""


@dataclass(frozen=True)
class Row:
    """One measurement."""

    name: str
    what: str
    seconds: float
    """It takes on eight H200, as measured, less what steps that are no longer taken would; the first of a session waits
    for the processes to start. With both proofs they come to 543, of a budget of 545."""
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    storage: str | None = None
    microbatches: int = 1
    """Of a step, on each replica."""
    most: int = 8
    """The largest micro-batch that is tried."""
    methods: str = "lora"
    steps: int = 6
    warm_up: int = 2
    ceiling: bool = False
    slices: bool = False
    """Whether every method is measured on the largest slice of layers that fits all of them by the plan, and on half of
    it; else on all layers. The steps of LoRA on all layers took 37 s of a part's 103,
    and its slices had said their time within 0.1%."""
    goals: dict[str, float] = field(default_factory=dict)
    """By what is compared: `speed`, tokens/s per GPU of LoRA; `ratio`, its speed over full fine-tuning's."""

    def overrides(self, gpus: int, micro_batch: int) -> list[str]:
        """`section.key=value` for this layout."""
        data = gpus // (self.tensor * self.pipeline)
        return [
            f"parallel.tensor={self.tensor}",
            f"parallel.sequence={'true' if self.tensor > 1 else 'false'}",
            f"parallel.tp_comm_overlap={'true' if self.tensor > 1 else 'false'}",
            f"parallel.pipeline={self.pipeline}",
            f"parallel.virtual_pipeline={self.virtual}",
            TIMEOUT,
            f"base.storage={self.storage or 'null'}",
            f"data.micro_batch_size={micro_batch}",
            f"data.global_batch_size={micro_batch * data * self.microbatches}",
        ]

    def command(
        self, config: str, overrides: Sequence[str], *, gpus: int, micro_batch: int, layers: int | None = None
    ) -> list[str]:
        """`bench ...` without --out: a slice of `layers`, or as many as fit by the plan, visited once."""
        words = ["bench", config, *overrides, *self.overrides(gpus, micro_batch), "--methods", self.methods]
        words += ["--visits", "1", "--steps", str(self.steps), "--warm-up", str(self.warm_up), "--profile", "1"]
        words += [] if layers is None else ["--layers", str(layers)]
        return words if self.ceiling else [*words, "--no-ceiling"]


def chunks_of(layers: int, stages: int) -> int:
    """The most chunks a stage, up to a limit, into which its layers divide evenly; raises ConfigError."""
    if layers % stages:
        raise ConfigError(
            f"{layers} layers do not divide among the {stages} stages of a pipeline: set model.num_layers to a "
            f"multiple of {stages}, or --gpus"
        )
    own = layers // stages
    return max(chunks for chunks in range(1, _MOST_CHUNKS + 1) if own % chunks == 0)


def rows_for(gpus: int, layers: int) -> list[Row]:
    """The rows of N GPUs, what matters most first; those that coincide on few GPUs come once.

    Raises:
        ConfigError: no such layouts.
    """
    if gpus < 2 or gpus % 2:
        raise ConfigError(f"--gpus {gpus}: the layouts need an even number of at least 2 processes")
    half, interleaved = gpus // 2, chunks_of(layers, gpus)
    rows = [
        Row(f"bf16-tp{gpus}", f"bf16, TP={gpus}", 88, tensor=gpus, ceiling=True, goals={"speed": 800}),
        Row(f"fp8-tp{gpus}", f"FP8, TP={gpus}", 44, tensor=gpus, storage="fp8", goals={"speed": 1300}),
        Row(
            "full",
            f"bf16, TP={gpus}, LoRA beside full fine-tuning",
            84,
            tensor=gpus,
            microbatches=4,
            most=4,
            methods="lora,full",
            steps=3,
            warm_up=1,
            slices=True,
            goals={"ratio": 1.45},
        ),
    ]
    if half > 1:
        chunks = chunks_of(layers, 2)
        what = f"bf16, TP={half} x PP=2, {chunks} chunks a stage"
        halves = {"tensor": half, "pipeline": 2, "virtual": chunks}
        rows += [
            Row(f"bf16-tp{half}-pp2", what, 53, **halves, most=4, microbatches=4, steps=3, warm_up=1),
            Row(f"fp8-tp2-dp{half}", f"FP8, TP=2 x DP={half}", 46, tensor=2, storage="fp8", goals={"speed": 1300}),
        ]
    what = f"bf16, PP={gpus}, interleaved, {interleaved} chunks a stage"
    sizes = {"pipeline": gpus, "virtual": interleaved, "microbatches": 2 * gpus}
    return [*rows, Row(f"bf16-pp{gpus}", what, 50, **sizes, most=1, steps=2, warm_up=1)]


def shape_of(config: Config) -> ModelShape:
    """The model's; raises ConfigError where the configuration leaves the vocabulary to a tokenizer."""
    if config.model.vocab_size is None:
        raise ConfigError("model.vocab_size is not given: the tokens of a bench are random numbers below it")
    return resolve_shape(config.model, tokenizer_vocab_size=config.model.vocab_size)


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise ConfigError for a setting that each row makes itself."""
    for override in overrides:
        if override.startswith(OWNED):
            raise ConfigError(f"{override}: the layouts set that themselves; leave it out (see --list)")


@dataclass(frozen=True)
class Choice:
    """The micro-batch of a row, and what the plan says of it."""

    micro_batch: int
    planned_bytes: int
    """Of the rank that needs most, with CUDA's context."""
    fits: bool
    """The whole model; else slices are measured."""


def choose_micro_batch(
    row: Row, config: str, overrides: Sequence[str], *, gpus: int, memory: float, most: int
) -> Choice:
    """The largest power of two at which LoRA on all layers fits a GPU of `memory` bytes by the plan; else 1.

    Raises:
        ConfigError: the layout cannot work.
    """
    sizes = [size for size in (8, 4, 2, 1) if size <= min(most, row.most)]
    settled = [load_config(config, [*overrides, *row.overrides(gpus, size)]) for size in sizes]
    shape = shape_of(settled[0])
    method = choose_method(settled[0].method, num_layers=shape.num_layers)
    check_plan(settled[-1], shape, method, gpus)
    stages = stage_weights(settled[0], shape, method)
    data = gpus // (row.tensor * row.pipeline)
    needed = 0
    for size, tried in zip(sizes, settled, strict=True):
        plan = plan_method(tried, shape, method, stages, data_size=data)
        needed = plan.largest.memory.total
        if plan.fits((SHARE if size == 1 else _ROOMY) * memory):
            return Choice(size, needed, True)
    return Choice(1, needed, False)


def choose_slice(
    row: Row, config: str, overrides: Sequence[str], *, gpus: int, micro_batch: int, memory: float
) -> int | None:
    """The most layers that fit a GPU of `memory` bytes by the plan with every method of a row of slices; None for one
    of whole models, and where not one layer fits: the bench says so."""
    if not row.slices:
        return None
    settled = load_config(config, [*overrides, *row.overrides(gpus, micro_batch)])
    shape, data = shape_of(settled), gpus // (row.tensor * row.pipeline)

    def fits(layers: int) -> bool:
        cut = slice_of(shape, layers)
        for name in row.methods.split(","):
            tried = bench_config(settled, name)
            method = method_of(tried, cut)
            stages = stage_weights(tried, cut, method)
            if not plan_method(tried, cut, method, stages, data_size=data).fits(_ROOMY * memory):
                return False
        return True

    return most_that_fit(fits, all_layers=shape.num_layers, unit=unit_of(settled))

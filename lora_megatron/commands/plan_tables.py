# SPDX-License-Identifier: Apache-2.0
"""A plan as tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_megatron.measure.console import print_table
from lora_megatron.measure.units import show_bytes, show_count, show_ratio, show_seconds
from lora_megatron.planning.gpus import Gpu
from lora_megatron.planning.plan import MEMORY_KINDS, MethodPlan, Plan, RankPlan
from lora_megatron.planning.recompute import describe
from lora_megatron.planning.search import Candidate
from lora_megatron.planning.speed import EFFICIENCY, Speed
from lora_megatron.planning.weights import STORAGE

_GIB = 2**30
_MOST_RANKED = 12
_SHORT = {
    "frozen_weights": "frozen",
    "trained_weights": "trained",
    "gradients": "grads",
    "optimizer": "optim.",
    "activations": "activ.",
    "logits": "logits",
    "communication": "comm.",
    "workspace": "work",
    "context": "CUDA",
}
assert tuple(_SHORT) == MEMORY_KINDS


def print_plan(plan: Plan, gpu: Gpu, memory: float, *, nearest: Candidate | None) -> None:
    """Memory by kind for each distinct rank, then the method beside full fine-tuning, then whether it fits."""
    methods = [plan.chosen] if plan.chosen.method == plan.full.method else [plan.chosen, plan.full]
    for method in methods:
        print_table(
            f"{method.method}: planned memory of a rank, GiB", ("stage", "layers", "ranks", *_SHORT.values(), "total"),
            [*_rank_rows(method)],
        )  # fmt: skip
    print_table(f"{_layout(plan)} on {gpu.name}", _titles(plan), [*_comparison(plan, gpu, memory)])
    storage = plan.config.base.storage
    if storage in STORAGE:
        print(f"Frozen linear weights in {storage}: {STORAGE[storage]}.")
    if plan.config.base.head == "fp8":
        print(f"The output layer in fp8: {STORAGE['fp8']}; a second copy turned round is part of the workspace.")
    print(
        f"Weights, gradients and optimizer state are exact. Speed is an estimate: {EFFICIENCY:.0%} of the dense peak, "
        "collectives not overlapped. It leaves out the optimizer's step and the launching of kernels, which bound "
        "small models and batches."
    )
    print(_verdict(plan, gpu, memory, nearest))


def print_ranking(ranking: Sequence[Candidate], plan: Plan, gpu: Gpu, memory: float) -> None:
    """The fastest layouts that fit; the plan of the first follows."""
    rows = []
    for candidate in ranking[:_MOST_RANKED]:
        config = candidate.config
        cut = config.parallel
        rows.append(
            (
                f"{cut.tensor} x {cut.pipeline} x {candidate.data_size}",
                "yes" if cut.sequence else "no",
                describe(candidate.settled),
                str(config.data.micro_batch_size),
                _gib(candidate.needed),
                f"{candidate.speed.tokens_per_second_per_gpu:,.0f}",
                f"{candidate.speed.tokens_per_second:,.0f}",
                f"{candidate.speed.bubble:.1%}",
            )
        )
    shown = f"the {len(rows)} fastest of {len(ranking)}" if len(ranking) > len(rows) else f"all {len(rows)}"
    print_table(
        f"Layouts of {plan.world_size} GPUs that fit into {memory / 1e9:g} GB: {shown}",
        (
            "tensor x pipeline x data",
            "sequence",
            "recompute",
            "micro batch",
            "largest rank, GiB",
            "tokens/s/GPU",
            "tokens/s",
            "bubble",
        ),
        rows,
    )


def _rank_rows(method: MethodPlan) -> Iterator[tuple[str, ...]]:
    for rank in method.ranks:
        cells = (_gib(getattr(rank.memory, kind)) for kind in (*MEMORY_KINDS, "total"))
        yield (str(rank.stage), _layers(rank), show_count(rank.count), *cells)


def _gib(value: int) -> str:
    return "0" if not value else f"{value / _GIB:,.2f}" if value >= 0.1 * _GIB else f"{value / _GIB:.1g}"


def _layers(rank: RankPlan) -> str:
    return ", ".join(f"{part.start}-{part.stop - 1}" if len(part) > 1 else f"{part.start}" for part in rank.layers)


def _layout(plan: Plan) -> str:
    config = plan.config
    cut = f"tensor {config.parallel.tensor} x pipeline {config.parallel.pipeline} x data {plan.data_size}"
    return f"{cut} = {plan.world_size} GPUs, recompute {describe(config)}"


def _titles(plan: Plan) -> tuple[str, ...]:
    if plan.chosen.method == plan.full.method:
        return ("what", plan.chosen.method)
    return ("what", plan.chosen.method, "full fine-tuning", "ratio")


def _comparison(plan: Plan, gpu: Gpu, memory: float) -> Iterator[tuple[str, ...]]:
    pairs = _values(plan.chosen, plan.speed(gpu)), _values(plan.full, plan.full_speed(gpu))
    for (what, shown, value), (_, other, whole) in zip(*pairs, strict=True):
        row = (what, shown, other, show_ratio(value, whole))
        yield row[: len(_titles(plan))]
    if plan.chosen.host_bytes:
        yield ("locked in the hosts' memory", show_bytes(plan.chosen.host_bytes), "0", "")[: len(_titles(plan))]
    fits = ("fits", *("yes" if method.fits(memory) else "no" for method in (plan.chosen, plan.full)), "")
    yield fits[: len(_titles(plan))]


def _values(method: MethodPlan, speed: Speed) -> Iterator[tuple[str, str, float]]:
    """(what, as people read it, the number)."""
    largest, total = method.largest.memory.total, method.total_memory["total"]
    yield "parameters", show_count(method.parameters), method.parameters
    yield "trained parameters", show_count(method.trainable_parameters), method.trainable_parameters
    yield "to keep for a task", show_bytes(method.saved_bytes), method.saved_bytes
    yield "the same as a file", show_bytes(method.saved_file_bytes), method.saved_file_bytes
    yield "training checkpoint", show_bytes(method.checkpoint_bytes), method.checkpoint_bytes
    yield "largest rank", show_bytes(largest), largest
    yield "all ranks", show_bytes(total), total
    for name, flops in (("model", method.flops.model), ("hardware", method.flops.hardware)):
        yield f"{name} TFLOP per token", f"{flops / 1e12:.4g}", flops
    rate = speed.tokens_per_second_per_gpu
    yield "expected tokens/s per GPU", f"{rate:,.1f}" if rate < 1000 else show_count(rate), rate
    yield "expected step", show_seconds(speed.step_seconds), speed.step_seconds
    yield "pipeline bubble", f"{speed.bubble:.1%}", speed.bubble


def _verdict(plan: Plan, gpu: Gpu, memory: float, nearest: Candidate | None) -> str:
    rank = plan.chosen.largest
    need = f"stage {rank.stage} needs {show_bytes(rank.memory.total)} of {show_bytes(memory)} ({memory / 1e9:g} GB)"
    if plan.chosen.fits(memory):
        return f"It fits: {need}."
    if nearest is None:
        return f"It does not fit: {need}. No layout of up to 4096 GPUs does."
    changes = " ".join(f"{key}={str(value).lower()}" for key, value in nearest.changes(plan.config).items())
    where = f"{nearest.world_size} GPUs" if nearest.world_size != plan.world_size else "as many GPUs"
    return f"It does not fit: {need}. The nearest layout that does, on {where}: {changes or 'the same settings'}"

# SPDX-License-Identifier: Apache-2.0
"""The rows of `launch/goals.py`: what runs for each, and which numbers of its report are held to which goals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "launch" / "configs"
GIB = 2**30
Report = dict[str, Any]
Value = tuple[str, float, str, float]
"""What, its value, `>=` or `<=`, and the goal."""


@dataclass(frozen=True)
class Row:
    """One measurement: what runs on how many GPUs, and which numbers of its report have goals."""

    command: tuple[str, ...]
    values: Callable[[Report], list[Value]]
    gpus: int = 1
    variables: tuple[tuple[str, str], ...] = ()
    """Of its environment, besides what is set already."""


def bench(
    config: str,
    *more: str,
    layers: int,
    methods: str = "lora",
    visits: int = 1,
    steps: int = 6,
    warm_up: int = 2,
) -> tuple[str, ...]:
    """The arguments of a `lora-megatron bench`; a step is one microbatch unless `more` says otherwise."""
    fixed = ("--methods", methods, "--layers", str(layers), "--visits", str(visits), "--steps", str(steps))
    path = str((CONFIGS / f"{config}.yaml").relative_to(ROOT))
    return ("-m", "lora_megatron", "bench", path, "data.global_batch_size=1", *more, *fixed, "--warm-up", str(warm_up))


def with_attention(command: tuple[str, ...], attention: str) -> tuple[str, ...]:
    """A row's command with another `train.attention` than torch's; what is compared with PEFT keeps torch's."""
    if attention == "torch" or "launch/bench_peft.py" in command:
        return command
    if command[0] == "-m":
        return (*command[:4], f"train.attention={attention}", *command[4:])  # behind the configuration
    return (*command, "--attention", attention)


def last_row(report: Report, method: str = "lora") -> Report:
    """Of the whole model, measured or from slices."""
    return [row for row in report["rows"] if row["method"] == method and not row["out_of_memory"]][-1]


def speed(goal: float, peak_gib: float | None = None) -> Callable[[Report], list[Value]]:
    """tokens/s per GPU, and the peak."""

    def values(report: Report) -> list[Value]:
        row = last_row(report)
        found: list[Value] = [("tokens/s per GPU", row["tokens_per_second_per_rank"], ">=", goal)]
        if peak_gib is not None:
            found.append(("peak, GiB per GPU", row["peak_bytes"] / GIB, "<=", peak_gib))
        return found

    return values


def lean(goal: float, gpus: int) -> Callable[[Report], list[Value]]:
    return lambda report: [("peak, GiB over all GPUs", gpus * last_row(report)["peak_bytes"] / GIB, "<=", goal)]


def share(report: Report) -> list[Value]:
    """Of the largest slice that was measured, with head and loss, and of the whole model that the slices speak of."""
    measured = [row for row in report["rows"] if not row["extrapolated_from"] and not row["out_of_memory"]]
    return [
        ("share of the products' rate, slice", measured[-1]["share_of_ceiling"], ">=", 0.92),
        ("the same, all layers by the slices", last_row(report)["share_of_ceiling"], ">=", 0.92),
    ]


def ratio(goal: float) -> Callable[[Report], list[Value]]:
    return lambda report: [("LoRA over full fine-tuning", report["ratios"][-1]["speed"], ">=", goal)]


def best_regimes(report: Report) -> list[Value]:
    """Full fine-tuning with recomputation, without which no such model fits, against the LoRA of row `full`."""
    other = Path(report["folder"]).parent / "full" / "report.json"
    if not other.is_file():
        return []
    lora = last_row(json.loads(other.read_text(encoding="utf-8")))["tokens_per_second_per_rank"]
    return [("LoRA over full with recompute", lora / last_row(report, "full")["tokens_per_second_per_rank"], ">=", 1.9)]


def rivals(report: Report) -> list[Value]:
    rows = {row["case"]: row for row in report["rows"] if row["layers"] == 4 and not row["out_of_memory"]}
    peft, found = rows["peft"], []
    for case, goal in (("bf16", 1.2), ("fp8", 1.8)):
        found.append(
            (f"speed over PEFT, {case}", rows[case]["tokens_per_second"] / peft["tokens_per_second"], ">=", goal)
        )
        held = rows[case]["activation_bytes"] / peft["activation_bytes"]
        found.append((f"activations over PEFT's, {case}", held, "<=", 0.7))
    return found


def tax(report: Report) -> list[Value]:
    """Of one more layer, and of the largest slice, head and embedding included: the one is a difference of two slices,
    and is off by what both are off."""
    goals, found = {"bf16": 0.03, "fp8": 0.05}, list[Value]()
    for row in report["taxes"]:
        most = max(row["slices"], key=int)
        for what, value in (("a layer", row["layer"]), (f"{most} layers", row["slices"][most])):
            found.append((f"{row['storage']}, {row['part']}, {what}", value["median"], "<=", goals[row["storage"]]))
    return found


ONE, TWO, LLAMA = "gpt3_175b_1gpu", "gpt3_175b_2gpu", "llama2_70b_1gpu"
BF16 = ("base.storage=null", "base.gemm=null", "train.recompute=none")
LEAN = ("train.recompute=full", "train.recompute_unit=3")
TENSOR = ("parallel.pipeline=1", "parallel.tensor=2", "parallel.sequence=true", "parallel.tp_comm_overlap=true")
CHUNKS = (
    "parallel.virtual_pipeline=48",
    "parallel.pp_comm_copy=true",
    "train.recompute=none",
)
FEW_CHANNELS = (("NCCL_MAX_NCHANNELS", "8"), ("NCCL_MAX_P2P_NCHANNELS", "8"))
"""NCCL's communicators then take 1.07 GiB of an H200 at PP=2, instead of over 2.5 (by what recompute=auto found free).
Where stages only pass hidden states on, 4 channels and 32 were equally fast."""
FAST = ("base.fast_accum=both", "base.head=fp8")
"""What changes roundings, and is off unless asked for."""
GRAPH = "train.cuda_graph=true"
TAX = ("launch/adapter_tax.py", "--cuda-graph")
TAX_1 = ("--layers", "4,12")
"""Two slices as far apart as memory lets them be: their difference is divided by eight layers, and so is what each
varies by. Not from two layers on: at TP=1 in bf16 such a slice took as long with adapters as without."""
TAX_2 = ("--tensor", "2", "--sequence-parallel", "--layers", "4,24")
ONCE = ("--warm-up", "6", "--steps", "10", "--rounds", "4")
"""A card that has just built a model is cool and fast: it steps some times before it is timed. What slices vary by is
from round to round, not from step to step."""
FOUR = ("--microbatches", "4", "--warm-up", "4", "--steps", "10", "--rounds", "3")
"""They share one update of the adapters and one sum over tensor ranks, which weigh most in a whole step of one
microbatch; so many steps take as long as those of one."""
PAIRS = ("data.micro_batch_size=2", "data.global_batch_size=4")
BATCH_4 = ("data.micro_batch_size=4", "data.global_batch_size=16")
SPARE_4_GIB = 135.0
"""Of an H200's 139."""
ROWS = {
    "175b-nf4": Row(bench(ONE, layers=96), speed(1000, SPARE_4_GIB)),
    "175b-nf4-bf16": Row(bench(ONE, "base.gemm=bf16", layers=96), speed(750, SPARE_4_GIB)),
    "175b-lean": Row(bench(ONE, *LEAN, layers=96, steps=3), lean(90, 1)),
    "llama2-70b-fp8": Row(bench(LLAMA, layers=80), speed(2650)),
    "llama2-70b-nf4": Row(bench(LLAMA, "base.storage=nf4", "base.gemm=fp8", layers=80), speed(2650)),
    "slice": Row(bench(ONE, *BF16, *BATCH_4[:1], "data.global_batch_size=4", layers=16, visits=2), share),
    "full": Row(bench(ONE, *BF16, *BATCH_4, layers=2, methods="lora,full", visits=2), ratio(1.47)),
    "full-recomputed": Row(
        bench(ONE, *BF16[:2], "train.recompute=full", *BATCH_4, layers=2, methods="full", visits=2), best_regimes
    ),
    "peft": Row(("launch/bench_peft.py", "--layers", "4", "--steps", "8", "--rounds", "2"), rivals),
    "tax": Row((*TAX, *TAX_1, *ONCE), tax),
    "tax-four": Row((*TAX, *TAX_1, *FOUR), tax),
    "175b-2gpu": Row(
        bench(TWO, "data.global_batch_size=32", layers=96, steps=2, warm_up=1), speed(1500, SPARE_4_GIB), gpus=2
    ),
    "175b-2gpu-chunks": Row(
        bench(TWO, *CHUNKS, "base.transposes=group", "data.global_batch_size=32", layers=96, steps=2, warm_up=1),
        speed(1500, SPARE_4_GIB),
        gpus=2,
        variables=FEW_CHANNELS,
    ),
    "175b-2gpu-chunks-fast": Row(
        bench(TWO, *CHUNKS, *FAST, "base.transposes=host", "data.global_batch_size=64", layers=96, steps=3, warm_up=1),
        speed(1500, SPARE_4_GIB),
        gpus=2,
        variables=FEW_CHANNELS,
    ),
    "175b-2gpu-tensor": Row(bench(TWO, *TENSOR, *PAIRS, GRAPH, layers=96, steps=4), speed(1500, SPARE_4_GIB), gpus=2),
    "175b-2gpu-lean": Row(bench(TWO, *TENSOR, *LEAN, layers=96, steps=3), lean(174, 2), gpus=2),
    "tax-2gpu": Row((*TAX, *TAX_2, *ONCE), tax, gpus=2),
    "tax-2gpu-four": Row((*TAX, *TAX_2, *FOUR), tax, gpus=2),
}

# SPDX-License-Identifier: Apache-2.0
"""The sentences of a bench's report: what the numbers are, what they are not, and where they were taken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from lora_megatron.bench.results import Row, layers_text
from lora_megatron.measure import markdown
from lora_megatron.measure.units import MISSING, show_bytes, show_count, show_seconds

Result = Mapping[str, Any]
_MUCH_LEFT = 256 * 2**20  # beyond cuBLAS's workspaces, which stay
_UNEVEN = 0.05


def notes(result: Result) -> list[str]:
    """One sentence or two each; the general ones last."""
    return [*_about_rows(result), *_about_products(result), *_general(result)]


def _about_rows(result: Result) -> Iterator[str]:
    every = result["shape"]["num_layers"]
    sizes = sorted({row["layers"] for row in result["rows"] if not row["extrapolated_from"]})
    slices = [size for size in sizes if size < every]
    if slices:
        layers = " and ".join(map(str, slices))
        yield (
            f"Slices: the first {layers} of {every} layers were measured, with embedding and head. "
            + (
                "Numbers for the whole model are extrapolated along the line through both; the ends of its range take "
                "the p10 of one and the p90 of the other."
                if len(slices) == 2
                else "One slice alone says nothing of the whole model."
            )
        )
    for row in result["rows"]:
        yield from _about_row(row)
    uneven = [row for row in result["rows"] if _disagreement(row) > _UNEVEN]
    if uneven:
        worst = max(uneven, key=_disagreement)
        yield (
            f"Two visits to a case disagree by more than {100 * _UNEVEN:.0f}% in {len(uneven)} cases, most in "
            f"{worst['method']}, {layers_text(worst)} (medians of "
            f"{' and '.join(map(show_seconds, worst['median_of_each_visit']))}): the machine was not quiet."
        )


def _disagreement(row: Row) -> float:
    """How much slower one visit to a case was than the other, as a share."""
    medians = row.get("median_of_each_visit") or [1.0]
    return float(max(medians) / min(medians) - 1)


def _about_row(row: Row) -> Iterator[str]:
    name = f"{row['method']}, {layers_text(row)}"
    if row["out_of_memory"]:
        yield f"{name}: {row['out_of_memory']}."
    if said := row.get("slices_said"):
        seconds, measured = said["step_seconds"]["median"], row["step_seconds"]["median"]
        yield (
            f"{name}: measured whole; its slices said {show_seconds(seconds)} a step "
            f"({100 * (seconds / measured - 1):+.1f}%) and a peak of {show_bytes(said['peak_bytes'])} "
            f"({100 * (said['peak_bytes'] / row['peak_bytes'] - 1):+.1f}%)."
        )
    if shares := row.get("communication"):
        yield f"{name}: {communication_text(shares)}"
    if row.get("left_bytes", 0) > _MUCH_LEFT:
        yield f"{name}: {show_bytes(row['left_bytes'])} were still allocated after it was freed."


def communication_text(shares: Sequence[Mapping[str, Any]]) -> str:
    """What the profiled steps said of every rank."""
    parts = (
        ("kernels of NCCL and copies between GPUs ran", "share"),
        ("of a step's time, nothing beside them", "exposed_share"),
        ("and nothing at all", "idle_share"),
    )
    texts = [f"{words} {range_text([each[key] for each in shares])}" for words, key in parts]
    return f"under the profiler {texts[0]} {texts[1]}, {texts[2]}; waiting for other ranks included."


def range_text(shares: Sequence[float]) -> str:
    """`12.0%`, or `12.0% to 15.1%` over the ranks."""
    low, high = (f"{100 * share:.1f}%" for share in (min(shares), max(shares)))
    return low if low == high else f"{low} to {high}"


def _about_products(result: Result) -> Iterator[str]:
    gemm = result["gemm"]
    if gemm["drift"] is not None:
        yield (
            f"The rate of the matrix products was {100 * gemm['drift']:+.1f}% different after the bench from before; "
            "the ceiling is the mean of both."
        )
    if gemm["without_room"]:
        yield f"No room to time the products of {', '.join(gemm['without_room'])}: the ceiling is that of the others."
    if result["device"] == "cpu" and result["precision"] == "bf16":
        yield "A CPU without bf16 units emulates them: neither the ceiling nor the share of it says much here."


def _general(result: Result) -> Iterator[str]:
    twice = min(result["visits"], result["steps"]) > 1
    visits = "each of two visits, the second in reverse order" if twice else "its one visit"
    yield (
        "A step is the one that train runs: data, forward, backward, reductions, the check for values that are not "
        "finite, clipping, update. Of each step the slowest rank's time counts. Every case is built anew for "
        f"{visits}, and freed after."
    )
    weights = "those of the stored base" if result["weights"] != "random" else "random"
    yield (
        f"Tokens are random, and weights are {weights} (a slice's always random); neither changes the speed. Every "
        "position counts in the loss."
    )
    yield (
        "Model FLOPs are those that the method needs (planning.flops): a linear layer forward, its dgrad where "
        "something below trains, its wgrad where it trains itself, and attention. Hardware FLOPs are those executed, "
        "with what is recomputed."
    )
    if not (gemm := result["gemm"])["before"] and not gemm["without_room"]:
        return
    yield (
        "The ceiling is the rate of the model's own matrix products alone, at their sizes on one rank, in the same "
        f"precision ({result['precision']}), on random numbers, in the same run: forward and dgrad, for a method that "
        "trains the base wgrad too. The share is hardware FLOP/s over it."
    )
    rows = [row for row in result["rows"] if "ceiling_flops_per_second" in row]
    if without := sorted({row["method"] for row in rows if row["ceiling_flops_per_second"] is None}):
        yield f"Frozen weights are multiplied in FP8, which is not timed alone: no ceiling for {', '.join(without)}."


def memory_note(result: Result) -> str:
    """What the memory numbers are."""
    if result["device"] != "cpu":
        return (
            "Peak and reserved are the CUDA allocator's; activations are what it held beyond weights, gradients and "
            "optimizer, temporary tensors included. The plan is lora-megatron plan's, without the CUDA context."
        )
    return (
        "Tracked bytes: activations are the most that autograd held at one time for the backward pass, peak and "
        "reserved are the sum of the four kinds. Temporary tensors, the interpreter and libraries come on top."
    )


def setting(result: Result) -> list[list[str]]:
    """(what, value) rows."""
    data, environment = result["data"], result["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    git = environment["git"] or {}
    return [
        ["command", result["command"]],
        ["layout", f"{markdown.layout_text(result['layout'])}; ranks: {result['world_size']}"],
        ["device", _device(environment["devices"])],
        ["batch", f"{data['micro_batch_size']} x {data['sequence_length']} tokens, {data['global_batch_size']} a step"],
        ["precision, recompute", f"{result['precision']}, {result['config']['train']['recompute']}"],
        ["optimizer state", f"sharding {result['config']['optimizer']['sharding']}"],
        ["steps", f"{result['steps']} measured of each case, {result['warm_up']} before each visit"],
        ["software", f"Python {environment['python']}, {packages}"],
        ["commit", f"{git.get('commit') or MISSING}{' with changes' if git.get('dirty') else ''}"],
    ]


def _device(devices: Mapping[str, Any]) -> str:
    if devices["type"] == "cuda":
        names = [f"{gpu['name']} ({show_bytes(gpu['memory_bytes'])})" for gpu in devices["gpus"]]
        return f"{', '.join(names)}; CUDA {devices['cuda']}"
    return f"{devices['name']}, {show_count(devices['cores'])} cores, {devices['threads_per_rank']} threads a rank"


def yaml_of(result: Result) -> str:
    """The resolved configuration."""
    return yaml.safe_dump(result["config"], sort_keys=False)

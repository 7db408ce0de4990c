# SPDX-License-Identifier: Apache-2.0
"""What visits to cases come to: a row of numbers for each case, extrapolated rows for the whole model, ratios.

Rows are JSON values, so that what is printed, drawn and stored is one and the same. In every row

    step_seconds, forward_backward_seconds, optimizer_seconds    {median, p10, p90} over the measured steps
    tokens_per_second_per_rank                                   positions of the global batch / median / ranks
    model_, hardware_flops_per_second_per_rank                   FLOPs of `planning.flops` / median / ranks
    ceiling_flops_per_second                                     of the products the method needs (`bench.gemm`)
    memory_by_rank, planned_by_rank                              bytes by kind
    plan_error                                                   planned / measured - 1 by kind, of the largest rank
    communication                                                shares of profiled steps by rank: `bench.communication`
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lora_megatron.bench.measurement import Case, Measured, OutOfMemory
from lora_megatron.bench.slices import Line
from lora_megatron.bench.timing import spread

Row = dict[str, Any]
COMPARED_KINDS = ("weights", "trained", "gradients", "optimizer", "activations", "peak")
_TIMES = ("step_seconds", "forward_backward_seconds", "optimizer_seconds")


@dataclass(frozen=True)
class Known:
    """What is known of a case without running it."""

    planned: list[dict[str, int]]
    """Bytes by kind (COMPARED_KINDS) of every rank."""
    model_flops: float
    hardware_flops: float
    """Of a step, over all ranks."""
    recompute: str = "none"
    """How much is recomputed (`planning.recompute.describe`)."""


@dataclass(frozen=True)
class Scale:
    """What turns seconds of a step into rates."""

    tokens: int
    """Positions of a global batch."""
    ranks: int


def layers_text(row: Row) -> str:
    """`4 layers`, or `96 layers (from 2 and 4)` for what is extrapolated from slices."""
    sizes = row["extrapolated_from"]
    count = f"{row['layers']} layer{'s' if row['layers'] > 1 else ''}"
    return f"{count} (from {sizes[0]} and {sizes[1]})" if sizes else count


def row_of(visits: Sequence[Measured], known: Known, scale: Scale, *, ceiling: float | None) -> Row:
    """The numbers of a case, over all visits to it; `ceiling` in FLOP/s."""
    case, steps = visits[0].case, [step for visit in visits for step in visit.steps]
    memory = [
        {kind: max(asdict(visit.memory[rank])[kind] for visit in visits) for kind in asdict(visits[0].memory[rank])}
        for rank in range(len(visits[0].memory))
    ]
    row: Row = {
        "method": case.method,
        "layers": case.layers,
        "extrapolated_from": None,
        "out_of_memory": None,
        "steps": len(steps),
        "step_seconds": spread([step.whole for step in steps]),
        "forward_backward_seconds": spread([step.forward_backward for step in steps]),
        "optimizer_seconds": spread([step.optimizer for step in steps]),
        "seconds_of_steps": [step.whole for step in steps],
        "median_of_each_visit": [statistics.median(step.whole for step in visit.steps) for visit in visits],
        "trainable_parameters": visits[0].trainable_parameters,
        "total_parameters": visits[0].total_parameters,
        "memory_by_rank": [{"rank": rank, **kinds} for rank, kinds in enumerate(memory)],
        "peak_bytes": max(kinds["peak"] for kinds in memory),
        "left_bytes": max(visit.left_bytes for visit in visits),
        "first_loss": visits[0].first_loss,
        "last_loss": visits[0].last_loss,
        "communication": [{"rank": rank, **one.facts()} for rank, one in enumerate(visits[-1].communication)],
    }
    return {**row, **_planned(known, memory), **_rates(row["step_seconds"]["median"], known, scale, ceiling)}


def row_without_memory(outcome: OutOfMemory, known: Known) -> Row:
    """The row of a case that did not fit."""
    row: Row = dict.fromkeys([*_TIMES, "peak_bytes", "memory_by_rank", "extrapolated_from"])
    return {
        **row,
        "method": outcome.case.method,
        "layers": outcome.case.layers,
        "out_of_memory": outcome.reason,
        **_planned(known, []),
    }


def extrapolate(
    small: Row, large: Row, known: Known, scale: Scale, *, layers: int, ceiling: float | None
) -> Row | None:
    """The row of all `layers` from two slices of one method; None where the larger slice was not slower.

    `step_seconds` has a range instead of percentiles: the lines through the p10 of one slice and the p90 of the other,
    and never below the p10 of the larger slice.
    """
    sizes = small["layers"], large["layers"]

    def at_all_layers(first: float, second: float) -> float:
        return Line.through((sizes[0], first), (sizes[1], second)).at(layers)

    seconds = {key: {"median": at_all_layers(small[key]["median"], large[key]["median"])} for key in _TIMES}
    if large["step_seconds"]["median"] <= small["step_seconds"]["median"]:
        return None
    first, second = small["step_seconds"], large["step_seconds"]
    seconds["step_seconds"] |= {
        "low": max(at_all_layers(first["p90"], second["p10"]), second["p10"]),
        "high": at_all_layers(first["p10"], second["p90"]),
    }
    count = {key: round(at_all_layers(small[key], large[key])) for key in ("trainable_parameters", "total_parameters")}
    return {
        "method": large["method"],
        "layers": layers,
        "extrapolated_from": list(sizes),
        "out_of_memory": None,
        **seconds,
        **count,
        "peak_bytes": round(at_all_layers(small["peak_bytes"], large["peak_bytes"])),
        "memory_by_rank": None,
        **_planned(known, []),
        **_rates(seconds["step_seconds"]["median"], known, scale, ceiling),
    }


def _planned(known: Known, memory: Sequence[Mapping[str, int]]) -> Row:
    row: Row = {"planned_by_rank": [{"rank": rank, **kinds} for rank, kinds in enumerate(known.planned)]}
    row["recompute"] = known.recompute
    row["planned_peak_bytes"] = max((kinds["peak"] for kinds in known.planned), default=None)
    row["plan_error"] = {kind: _error(known.planned, memory, kind) for kind in COMPARED_KINDS} if memory else None
    return row


def _error(planned: Sequence[Mapping[str, int]], memory: Sequence[Mapping[str, int]], kind: str) -> float | None:
    """planned / measured - 1 on the rank that has most of this kind."""
    if not planned:
        return None
    rank = max(range(len(memory)), key=lambda rank: memory[rank][kind])
    measured = memory[rank][kind]
    return planned[rank][kind] / measured - 1 if measured else None


def _rates(seconds: float, known: Known, scale: Scale, ceiling: float | None) -> Row:
    hardware = known.hardware_flops / seconds / scale.ranks
    return {
        "tokens_per_second_per_rank": scale.tokens / seconds / scale.ranks,
        "model_flops": known.model_flops,
        "hardware_flops": known.hardware_flops,
        "model_flops_per_second_per_rank": known.model_flops / seconds / scale.ranks,
        "hardware_flops_per_second_per_rank": hardware,
        "ceiling_flops_per_second": ceiling,
        "share_of_ceiling": hardware / ceiling if ceiling else None,
    }


def ratios(rows: Sequence[Row], reference: str) -> list[Row]:
    """Every other method against `reference` at the same number of layers: above 1 in `speed` is faster."""
    found = []
    for row in rows:
        others = [r for r in rows if r["method"] == reference and r["layers"] == row["layers"]]
        if row["method"] == reference or not others or not (row["step_seconds"] and others[0]["step_seconds"]):
            continue
        other = others[0]
        found.append(
            {
                "method": row["method"],
                "to": reference,
                "layers": row["layers"],
                "extrapolated": bool(row["extrapolated_from"] or other["extrapolated_from"]),
                "speed": other["step_seconds"]["median"] / row["step_seconds"]["median"],
                "peak_memory": row["peak_bytes"] / other["peak_bytes"],
                "trainable_parameters": row["trainable_parameters"] / other["trainable_parameters"],
            }
        )
    return found


def headline(rows: Sequence[Row], methods: Sequence[str]) -> list[Row]:
    """One row a method: of the most layers at which every method has its row, even if that is `out of memory`."""
    by_case = {Case(row["method"], row["layers"]): row for row in rows}
    sizes = sorted({row["layers"] for row in rows}, reverse=True)
    complete = [size for size in sizes if all(Case(method, size) in by_case for method in methods)]
    return [by_case[Case(method, complete[0])] for method in methods] if complete else list(rows)

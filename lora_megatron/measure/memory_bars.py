# SPDX-License-Identifier: Apache-2.0
"""Memory by kind and rank as stacked bars and as a table; ranks that hold the same share a bar and a row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lora_megatron.measure.html_page import Html
from lora_megatron.measure.markdown import MEMORY_KINDS
from lora_megatron.measure.svg_bars import Bar, stacked_bars
from lora_megatron.measure.units import show_bytes

_MOST_BARS = 24


Ranks = Sequence[Mapping[str, Any]]
"""`memory_by_rank` of a summary, see `measure.report`."""


def memory_bars(title: str, runs: Mapping[str, Ranks]) -> Html:
    """A chart of bytes. runs: the label of each run, or "" for an only one, -> its ranks.

    Where the allocator reserved more than the peak, a line marks how much.
    """
    bars = [
        Bar(_name(label, names), _parts(rank), _limit(rank))
        for label, by_rank in runs.items()
        for names, rank in _groups(by_rank)
    ]
    if len(bars) > _MOST_BARS:
        title = f"{title}: the {_MOST_BARS} largest of {len(bars)} different ones"
        bars = sorted(bars, key=lambda bar: -sum(bar.parts.values()))[:_MOST_BARS]
    return stacked_bars(title, bars, x_label="memory", unit="bytes", limit_name="reserved by the allocator")


def memory_table(runs: Mapping[str, Ranks]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of the same numbers; what the allocator reserved only where that is more than the peak."""
    groups = [(label, names, rank) for label, ranks in runs.items() for names, rank in _groups(ranks)]
    reserved = ["reserved"] if any(_limit(rank) is not None for _, _, rank in groups) else []
    kinds = [*MEMORY_KINDS, *reserved]
    rows = [[_name(label, names), *(show_bytes(rank.get(kind)) for kind in kinds)] for label, names, rank in groups]
    return ["", *kinds], rows


def _groups(by_rank: Ranks) -> list[tuple[str, Mapping[str, Any]]]:
    """(names of the ranks, one of them) for each set of ranks with the same numbers."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for rank in by_rank:
        same = json.dumps({key: value for key, value in rank.items() if key != "rank"}, sort_keys=True)
        groups.setdefault(same, []).append(rank)
    return [(rank_names([rank["rank"] for rank in ranks]), ranks[0]) for ranks in groups.values()]


def _name(label: str, names: str) -> str:
    return f"{label}, {names}" if label else names


def _limit(rank: Mapping[str, Any]) -> float | None:
    reserved, peak = rank.get("reserved"), rank.get("peak")
    return reserved if reserved is not None and peak is not None and reserved > peak else None


def _parts(rank: Mapping[str, Any]) -> dict[str, int]:
    """The kinds that add up to the peak; weights in two where it is known how much of them is trained."""
    sizes = {kind: rank.get(kind) or 0 for kind in MEMORY_KINDS if kind != "peak"}
    trained = rank.get("trained")
    if trained is None or not 0 <= trained <= sizes["weights"]:
        return sizes
    weights = sizes.pop("weights")
    return {"frozen weights": weights - trained, "trained weights": trained, **sizes}


def rank_names(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> `ranks 0-2, 5`; where that is long, how many there are."""
    pieces: list[list[int]] = []
    for rank in sorted(ranks):
        if pieces and rank == pieces[-1][1] + 1:
            pieces[-1][1] = rank
        else:
            pieces.append([rank, rank])
    if len(pieces) > 2:
        return f"rank {pieces[0][0]} and {len(ranks) - 1} like it"
    text = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in pieces)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"

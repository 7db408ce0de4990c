# SPDX-License-Identifier: Apache-2.0
"""Which ranks others wait for: the time each spends on its own work, and how often it was the slowest."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from operator import itemgetter

from lora_megatron.measure.decimation import XY, finite
from lora_megatron.measure.html_page import Html, paragraph, side_by_side
from lora_megatron.measure.run_record import RunRecord
from lora_megatron.measure.svg_bars import Bar, stacked_bars
from lora_megatron.measure.svg_lines import Series, line_chart

_CURVES_EACH = 4  # ranks with a curve of their own; of more, the extremes and the middle
_MOST_BARS = 12


def straggler_blocks(record: RunRecord) -> list[Html]:
    """Two charts, or a sentence where no rank's own time was recorded."""
    lines = record.stragglers
    if not lines:
        if record.summary.get("world_size") == 1:
            return [paragraph("Stragglers: there is one rank, and nobody waits for it.")]
        every = (record.config.get("train") or {}).get("straggler_every")
        setting = "" if every is None else f" (train.straggler_every = {every})"
        return [paragraph(f"Stragglers: no time of single ranks was recorded{setting}.")]
    ranks = max(len(line["busy_seconds"]) for line in lines)
    slowest = Counter(line["slowest"] for line in lines if isinstance(line.get("slowest"), int))
    bars = [
        Bar(f"rank {rank}", {"lines": count}, remark=f"{count} of {len(lines)}")
        for rank, count in sorted(slowest.items(), key=lambda pair: (-pair[1], pair[0]))[:_MOST_BARS]
    ]
    return [
        side_by_side(
            line_chart(
                "Stragglers: a rank's own time", _curves(record, ranks), y_label="busy time", unit="s", from_zero=True
            ),
            stacked_bars("Stragglers: how often a rank was the slowest", bars, x_label="lines of stragglers.jsonl"),
        )
    ]


def _curves(record: RunRecord, ranks: int) -> list[Series]:
    if ranks <= _CURVES_EACH:
        return [
            Series(f"rank {rank}", _points(record, itemgetter(rank)), colour=rank, style="dash" if rank % 2 else "line")
            for rank in range(ranks)
        ]
    return [
        Series("slowest rank", _points(record, max), colour=1),
        Series("median rank", _points(record, statistics.median), colour=0),
        Series("fastest rank", _points(record, min), colour=2, style="dash"),
    ]


def _points(record: RunRecord, choose: Callable[[Sequence[float]], float]) -> list[XY]:
    points: list[XY] = []
    for line in record.stragglers:
        try:
            points.append((line["step"], finite(choose(line["busy_seconds"]))))
        except (IndexError, TypeError, ValueError):  # another number of ranks after a resume, or a null
            points.append((line["step"], None))
    return points

# SPDX-License-Identifier: Apache-2.0
"""A corpus metric as sums over instances, which makes its bootstrap a matrix product.

BLEU, TER and METEOR are functions of counts that add up over a corpus, accuracy and ROUGE are averages. So a resampled
corpus needs no text: with w[i] how often instance i was drawn, its value is f(sum over i of w[i] * statistics[i]).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
_CELLS = 4_000_000  # of a block of weights: 32 MB


@dataclass(frozen=True)
class Sums:
    """One metric of one corpus."""

    statistics: np.ndarray
    """float64 [instances, k]."""
    value_of: Callable[[np.ndarray], float]
    """From a sum of them, [k], to the metric's value."""

    @property
    def value(self) -> float:
        """The metric of the whole corpus."""
        return float(self.value_of(self.statistics.sum(axis=0)))


@dataclass(frozen=True)
class Unavailable:
    """Stands where a metric cannot be computed here."""

    reason: str
    """A sentence: what is missing, and what to do."""


def average(values: Sequence[float], *, scale: float = 100.0) -> Sums:
    """The mean of one number per instance, times `scale`."""
    count = len(values)
    return Sums(np.asarray(values, dtype=np.float64)[:, None], lambda total: scale * float(total[0]) / count)


def intervals(
    metrics: Mapping[str, Sums], *, resamples: int, seed: int, level: float = LEVEL
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals: as many instances as there are are drawn with replacement, `resamples` times.

    All metrics see the same draws. Equal seeds give equal intervals.
    """
    if not metrics or resamples == 0:
        return {}
    count = len(next(iter(metrics.values())).statistics)
    generator = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in metrics}
    for start in range(0, resamples, block := max(1, _CELLS // count)):
        rows = min(block, resamples - start)
        draws = generator.integers(count, size=(rows, count))
        weights = np.stack([np.bincount(row, minlength=count) for row in draws]).astype(np.float64)  # [rows, instances]
        for name, metric in metrics.items():
            drawn[name] += [float(metric.value_of(total)) for total in weights @ metric.statistics]
    edges = (50 * (1 - level), 50 * (1 + level))
    return {name: _interval(np.percentile(values, edges), metrics[name].value) for name, values in drawn.items()}


def _interval(edges: np.ndarray, value: float) -> tuple[float, float]:
    low, high = (float(edge) for edge in edges)
    # Added up in another order, equal numbers may differ in their last digits: an interval of one point holds it.
    if np.isclose(low, value, rtol=1e-12):
        low = min(low, value)
    if np.isclose(high, value, rtol=1e-12):
        high = max(high, value)
    return low, high

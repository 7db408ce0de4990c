# SPDX-License-Identifier: Apache-2.0
"""The paper's tasks and how each is scored. Scales are the paper's:

| scale | metrics |
|---|---|
| 0 to 100 | bleu, meteor, rouge*, accuracy, exact_match, logical_form, execution |
| percent, 0 and up, less is better | ter |
| as it is | nist, cider (0 to 10) |

The paper prints METEOR and TER of WebNLG and DART as hundredths (.41 where this says 41).

e2e: what the E2E script (measure_scores.py) computes: mteval-13a BLEU and NIST; METEOR 1.5, ROUGE-L and CIDEr by COCO's
definitions on Penn Treebank tokens. webnlg, dart: texts lower-cased and split at every character that is no word's, as
the paper's code and the WebNLG challenge write them; then BLEU without smoothing (multi-bleu-detok: mteval tokens),
METEOR 1.5, and TER by tercom's definition. The paper's code averages a TER per text instead, keeps six references at
most and fills up with empty ones, which this does not (launch/results/2026-11-metrics.md). samsum: rouge-score's F1
with stemming.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lora_megatron.errors import ConfigError, DataError
from lora_megatron.metrics.coco import cider, rouge_l
from lora_megatron.metrics.meteor import meteor
from lora_megatron.metrics.ptb import ptb_tokens
from lora_megatron.metrics.rouge import rouge
from lora_megatron.metrics.sums import Sums, Unavailable, average, intervals
from lora_megatron.metrics.translation import bleu, nist, ter
from lora_megatron.metrics.wikisql import sql_accuracies

Texts = Sequence[str]
References = Sequence[Sequence[str]]
_NO_WORD = re.compile(r"(\W)")


@dataclass(frozen=True)
class Task:
    """A kind of data and what it is scored by."""

    name: str
    kind: Literal["generate", "classify"]
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ()
    """Of a classification, in the order of the data set."""


_ALL = (
    Task("wikisql", "generate", ("logical_form", "execution")),
    Task("mnli", "classify", ("accuracy",), ("entailment", "neutral", "contradiction")),
    Task("samsum", "generate", ("rouge1", "rouge2", "rouge_l")),
    Task("e2e", "generate", ("bleu", "nist", "meteor", "rouge_l", "cider")),
    Task("dart", "generate", ("bleu", "meteor", "ter")),
    Task("webnlg", "generate", ("bleu", "meteor", "ter")),
    Task("text", "generate", ("bleu", "rouge1", "rouge2", "rouge_l", "exact_match")),
)
MOST_RESAMPLES = 100_000
"""Of a bootstrap: an interval's ends move by less than its own noise beyond a few thousand."""
TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}


@dataclass(frozen=True)
class Scores:
    """What a set of predictions is worth."""

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    """95% percentile bootstrap intervals over instances."""
    unavailable: dict[str, str]
    """The metrics that could not be computed here, each with the reason in a sentence."""
    instances: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: {"scores": {metric: value}, "intervals": {metric: [low, high]}, ...}."""
        return {
            "scores": dict(self.values),
            "intervals": {name: list(edges) for name, edges in self.intervals.items()},
            "unavailable": dict(self.unavailable),
            "instances": self.instances,
        }


def score(
    task: str,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    metas: Sequence[str | None] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Scores:
    """The metrics of `task`, for one prediction per instance and all its accepted texts.

    metas: the column `meta` of the data, which execution accuracy needs. bootstrap: resamples behind the intervals, 0
    for none; seed: of their draws. Resampling holds fixed what NIST and CIDEr know of n-grams over the whole corpus
    (information weights, document frequencies) and, as METEOR and TER do, which reference fits best.

    Raises ConfigError for an unknown task or a negative number, DataError for counts that differ, nothing to score, an
    instance without references, or a meta that is damaged.
    """
    if task not in TASKS:
        raise ConfigError(f"task {task!r} is unknown; use one of {', '.join(TASKS)}")
    check_resampling(bootstrap=bootstrap, seed=seed)
    if len(predictions) != len(references):
        raise DataError(f"{len(predictions)} predictions for {len(references)} instances with references")
    if metas is not None and len(metas) != len(references):
        raise DataError(f"{len(metas)} metas for {len(references)} instances with references")
    if not predictions:
        raise DataError("there is no prediction to score")
    if bare := [number for number, texts in enumerate(references, start=1) if not texts]:
        raise DataError(f"instance {bare[0]} has no reference; give every instance at least one")
    found = _measure(task, predictions, references, metas)
    assert tuple(found) == TASKS[task].metrics
    sums = {name: metric for name, metric in found.items() if isinstance(metric, Sums)}
    return Scores(
        values={name: metric.value for name, metric in sums.items()},
        intervals=intervals(sums, resamples=bootstrap, seed=seed),
        unavailable={name: metric.reason for name, metric in found.items() if isinstance(metric, Unavailable)},
        instances=len(predictions),
    )


def check_resampling(*, bootstrap: int, seed: int = 0) -> None:
    """Raise ConfigError for numbers that `score` does not take."""
    if not 0 <= bootstrap <= MOST_RESAMPLES:
        raise ConfigError(f"--bootstrap {bootstrap} cannot be: give 0 to {MOST_RESAMPLES:,}")
    if seed < 0:
        raise ConfigError(f"--seed {seed} cannot be: give 0 or more")


def check_labels(task: str, references: Iterable[Sequence[str]]) -> None:
    """Raise DataError where a task that has labels is given something else: the accuracy would be 0 and say nothing."""
    labels = TASKS[task].labels
    for number, texts in enumerate(references if labels else (), start=1):
        if wrong := [text for text in texts if text.strip() not in labels]:
            raise DataError(
                f"instance {number}: {wrong[0][:60]!r} is no label of {task} ({', '.join(labels)}); are these the data "
                "of another task?"
            )


def _measure(
    task: str, predictions: Texts, references: References, metas: Sequence[str | None] | None
) -> Mapping[str, Sums | Unavailable]:
    if task == "wikisql":
        return sql_accuracies(predictions, references, metas)
    if task == "mnli":
        return {"accuracy": _exact(predictions, references)}
    if task == "samsum":
        return rouge(predictions, references)
    if task == "e2e":
        tokens = [" ".join(ptb_tokens(text)) for text in predictions]
        targets = [[" ".join(ptb_tokens(text)) for text in texts] for texts in references]
        return {
            "bleu": bleu(predictions, references),
            "nist": nist(predictions, references),
            "meteor": meteor(tokens, targets),
            "rouge_l": rouge_l(tokens, targets),
            "cider": cider(tokens, targets),
        }
    if task in ("dart", "webnlg"):
        predictions = [_split(text) for text in predictions]
        references = [[_split(text) for text in texts] for texts in references]
        return {
            "bleu": bleu(predictions, references, smoothing="none"),
            "meteor": meteor(predictions, references),
            "ter": ter(predictions, references),
        }
    overlap = rouge(predictions, references)
    return {"bleu": bleu(predictions, references), **overlap, "exact_match": _exact(predictions, references)}


def _exact(predictions: Texts, references: References) -> Sums:
    """Of texts without the white space around them."""
    pairs = zip(predictions, references, strict=True)
    return average([prediction.strip() in {text.strip() for text in texts} for prediction, texts in pairs])


def _split(text: str) -> str:
    return " ".join(" ".join(_NO_WORD.split(text.lower())).split())

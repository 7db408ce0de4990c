# SPDX-License-Identifier: Apache-2.0
"""The interface that evaluation uses: tasks, intervals, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora_megatron.errors import ConfigError, DataError
from lora_megatron.metrics.sums import Sums, average, intervals
from lora_megatron.metrics.tasks import TASKS, score

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"Restaurant {i} is a cheap place near the river, number {i * i}." for i in range(12)]
WORSE = [text if i % 3 else text.replace("cheap place", "dear pub") for i, text in enumerate(TEXTS)]
PERFECT = {
    **dict.fromkeys(
        ("bleu", "meteor", "rouge1", "rouge2", "rouge_l", "exact_match", "accuracy", "logical_form"), 100.0
    ),
    "ter": 0.0,
}


@pytest.mark.parametrize("task", TASKS)
def test_references_score_themselves_perfectly(task: str) -> None:
    labels = TASKS[task].labels
    texts = ["SELECT a FROM table WHERE b = 3"] * 3 if task == "wikisql" else list(labels or TEXTS)
    other = labels[0] if labels else "something else"
    found = score(task, texts, [[other, text] for text in texts], bootstrap=20)
    assert set(found.values) | set(found.unavailable) == set(TASKS[task].metrics)
    assert not set(found.values) & set(found.unavailable)
    for name, value in found.values.items():
        assert value == pytest.approx(PERFECT.get(name, value)), name
        assert found.intervals[name][0] <= value <= found.intervals[name][1], name
    if task == "e2e":
        assert found.values["nist"] > 4
        assert found.values["cider"] == pytest.approx(5)  # one of two references is the prediction


@pytest.mark.parametrize("task", ["e2e", "webnlg", "samsum", "text", "mnli"])
def test_worse_texts_score_worse_and_equal_seeds_equally(task: str) -> None:
    right, worse = list(TEXTS), list(WORSE)
    if labels := TASKS[task].labels:
        right = [labels[row % 3] for row in range(len(right))]
        worse = [*right[:-1], "none of them"]
    references = [[text] for text in right]
    best, found = (score(task, texts, references, bootstrap=200, seed=3) for texts in (right, worse))
    for name, value in found.values.items():
        assert (value > best.values[name]) if name == "ter" else (value < best.values[name]), name
        low, high = found.intervals[name]
        assert low < value < high, name
    assert found == score(task, worse, references, bootstrap=200, seed=3)
    assert score(task, worse, references, bootstrap=0).intervals == {}


def test_more_references_help_and_their_order_does_not() -> None:
    one = score("webnlg", ["a b c d e"], [["a x c d e f"]], bootstrap=0).values
    two = score("webnlg", ["a b c d e"], [["a x c d e f", "A b c d, e"]], bootstrap=0).values
    assert two["bleu"] > one["bleu"]
    assert two["ter"] < one["ter"]
    assert two == score("webnlg", ["a b c d e"], [["A b c d, e", "a x c d e f"]], bootstrap=0).values


def test_webnlg_texts_are_lower_cased_and_split_at_what_is_no_word() -> None:
    found = score(
        "webnlg", ["The Aarhus-Airport (EKAH) is 25.0 m high."], [["the aarhus - airport ( ekah ) is 25 . 0 m high ."]]
    )
    assert (found.values["bleu"], found.values["ter"]) == (100, 0)


def test_accuracy_is_of_whole_labels() -> None:
    labels = TASKS["mnli"].labels
    found = score(
        "mnli", [f" {labels[0]}\n", labels[1], "entail", ""], [[labels[0]], [labels[2]], [labels[0]], [labels[1]]]
    )
    assert found.values == {"accuracy": 25}


def test_an_interval_is_that_of_the_binomial() -> None:
    """Accuracy 0.3 of 400: 1.96 standard errors of sqrt(0.3 * 0.7 / 400) to each side."""
    low, high = intervals({"accuracy": average([i < 120 for i in range(400)])}, resamples=4000, seed=1)["accuracy"]
    assert (low, high) == pytest.approx((30 - 4.49, 30 + 4.49), abs=0.3)


def test_a_resampled_corpus_is_the_metric_of_the_drawn_instances() -> None:
    """What the matrix product does, done by drawing rows; ratios of sums are no means of ratios."""
    statistics = np.random.default_rng(0).integers(1, 9, size=(30, 2)).astype(float)
    metric = Sums(statistics, lambda total: total[0] / total[1])
    draws = np.random.default_rng(5).integers(30, size=(50, 30))
    expected = np.percentile([metric.value_of(statistics[row].sum(axis=0)) for row in draws], (2.5, 97.5))
    assert intervals({"ratio": metric}, resamples=50, seed=5)["ratio"] == pytest.approx(tuple(expected))
    assert intervals({"ratio": metric}, resamples=50, seed=6) != intervals({"ratio": metric}, resamples=50, seed=5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("e2f", ["a"], [["a"]]), ConfigError, "task 'e2f' is unknown; use one of wikisql, mnli"),
        (("e2e", ["a", "b"], [["a"]]), DataError, "2 predictions for 1 instances"),
        (("e2e", [], []), DataError, "no prediction"),
        (("e2e", ["a", "b"], [["a"], []]), DataError, "instance 2 has no reference"),
    ],
)
def test_what_cannot_be_scored_is_refused(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        score(*arguments)


def test_numbers_out_of_range_are_refused() -> None:
    for numbers, says in (
        ({"bootstrap": -1}, "--bootstrap -1 cannot be: give 0 to 100,000"),
        ({"bootstrap": 10**11}, "--bootstrap 100000000000 cannot be"),
        ({"seed": -1}, "--seed -1 cannot be: give 0 or more"),
    ):
        with pytest.raises(ConfigError, match=says):
            score("text", ["a"], [["a"]], **numbers)
    with pytest.raises(DataError, match="3 metas for 1"):
        score("wikisql", ["a"], [["a"]], metas=["", "", ""])


def test_to_dict_is_json() -> None:
    found = score("dart", ["a b"], [["a c"]], bootstrap=5)
    again = json.loads(json.dumps(found.to_dict()))
    assert again["scores"] == found.values
    assert again["intervals"]["ter"] == list(found.intervals["ter"])
    assert (again["unavailable"], again["instances"]) == (found.unavailable, 1)


def test_scoring_does_not_import_torch() -> None:
    code = (
        "import sys, lora_megatron.metrics.tasks as t, lora_megatron.commands.score; assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0

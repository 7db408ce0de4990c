# SPDX-License-Identifier: Apache-2.0
"""ROUGE-L and CIDEr as the COCO caption evaluation defines them, which the E2E script runs.

Both average a score per instance, over texts that are tokens with spaces between. They differ from what their names
promise elsewhere: this ROUGE-L weighs recall more (beta = 1.2) and takes precision and recall from different
references; this CIDEr clips and has a Gaussian penalty of length, which papers call CIDEr-D.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from lora_megatron.metrics.sums import Sums, average

_BETA = 1.2
_ORDER = 4
_SIGMA = 6.0

Gram = tuple[str, ...]
Tokens = Sequence[Sequence[str]]


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Sums:
    """ROUGE-L, 0 to 100: the F-measure of the best precision and the best recall over the references."""
    return average(
        [
            _longest_common(prediction.split(), [text.split() for text in texts])
            for prediction, texts in zip(predictions, references, strict=True)
        ]
    )


def _longest_common(prediction: Sequence[str], references: Tokens) -> float:
    precision = recall = 0.0
    prediction = prediction or [""]  # COCO splits an empty text into one empty token
    for reference in references:
        reference = reference or [""]
        common = _lcs_length(prediction, reference)
        precision, recall = max(precision, common / len(prediction)), max(recall, common / len(reference))
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for left in a:
        before = 0  # row[j] of the last line
        for j, right in enumerate(b):
            before, row[j + 1] = row[j + 1], before + 1 if left == right else max(row[j + 1], row[j])
    return row[-1]


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Sums:
    """CIDEr, 0 to 10: cosine of tf-idf n-grams, averaged over n = 1..4 and the references, times 10.

    An n-gram's document frequency counts the instances whose references have it; one instance alone scores 0, as every
    n-gram is in all documents. For intervals the frequencies stay those of the whole corpus.
    """
    targets = [[_grams(text.split()) for text in texts] for texts in references]
    frequency = Counter(gram for texts in targets for gram in set().union(*texts))
    weigher = _Weigher(frequency, len(targets))
    scores = []
    for prediction, texts in zip(predictions, targets, strict=True):
        hypothesis = weigher.weigh(_grams(prediction.split()))
        scores.append(sum(hypothesis.similarity(weigher.weigh(text)) for text in texts) / len(texts))
    return average(scores, scale=10.0)


def _grams(tokens: Sequence[str]) -> Counter[Gram]:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, _ORDER + 1) for i in range(len(tokens) - n + 1))


class _Weigher:
    """Turns counts of n-grams into tf-idf vectors."""

    def __init__(self, frequency: Counter[Gram], documents: int) -> None:
        self._frequency, self._log_documents = frequency, math.log(documents)

    def weigh(self, counts: Counter[Gram]) -> _Vector:
        vector = _Vector()
        for gram, count in counts.items():
            weight = count * (self._log_documents - math.log(max(1, self._frequency[gram])))
            vector.weights[len(gram) - 1][gram] = weight
            vector.squares[len(gram) - 1] += weight**2
            if len(gram) == 2:  # the length that the penalty compares is counted in bigrams
                vector.length += count
        return vector


class _Vector:
    """tf-idf weights of one text's n-grams, by n - 1."""

    def __init__(self) -> None:
        self.weights: list[dict[Gram, float]] = [{} for _ in range(_ORDER)]
        self.squares = [0.0] * _ORDER
        self.length = 0

    def similarity(self, reference: _Vector) -> float:
        """The mean over n of the clipped cosine, times the penalty of a difference in length."""
        total = 0.0
        for n in range(_ORDER):
            norm = math.sqrt(self.squares[n] * reference.squares[n])
            other = reference.weights[n]
            if norm:
                shared = (
                    min(weight, other[gram]) * other[gram] for gram, weight in self.weights[n].items() if gram in other
                )
                total += sum(shared) / norm
        return total / _ORDER * math.exp(-((self.length - reference.length) ** 2) / (2 * _SIGMA**2))

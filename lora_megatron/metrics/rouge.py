# SPDX-License-Identifier: Apache-2.0
"""ROUGE-1, ROUGE-2 and ROUGE-L for summaries, by the package rouge-score."""

from __future__ import annotations

from collections.abc import Sequence

from lora_megatron.metrics.sums import Sums, average

TYPES = {"rouge1": "rouge1", "rouge2": "rouge2", "rouge_l": "rougeL"}


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Sums]:
    """F1 of each, 0 to 100, with Porter's stemmer; of the reference that fits best where there are several."""
    from rouge_score.rouge_scorer import RougeScorer  # loads NLTK, which no training needs

    scorer = RougeScorer(list(TYPES.values()), use_stemmer=True)
    found = [
        scorer.score_multi(list(texts), prediction) for prediction, texts in zip(predictions, references, strict=True)
    ]
    return {name: average([scores[kind].fmeasure for scores in found]) for name, kind in TYPES.items()}

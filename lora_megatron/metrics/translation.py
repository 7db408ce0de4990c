# SPDX-License-Identifier: Apache-2.0
"""BLEU, NIST and TER: what machine translation gave to text generation.

BLEU and TER are sacrebleu's, taken an instance at a time so that their counts can be resampled. NIST is ours: it has no
well-kept library (nltk's differs from NIST's own mteval-v13a), and its definition is short.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
from sacrebleu.metrics import BLEU, TER
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from lora_megatron.metrics.sums import Sums

_NIST_ORDER = 5
_NIST_BETA = -math.log(0.5) / math.log(1.5) ** 2  # the penalty is 0.5 where a text has two thirds of the length

Texts = Sequence[str]
References = Sequence[Sequence[str]]


def bleu(predictions: Texts, references: References, *, smoothing: Literal["exp", "none"] = "exp") -> Sums:
    """Corpus BLEU-4, 0 to 100, of lower-cased texts in mteval-13a tokens; the closest reference gives the length.

    smoothing: `exp` for an n-gram order without a hit, as mteval-v13a does, or `none`, as multi-bleu does.
    """
    scorer = BLEU(tokenize="13a", lowercase=True, smooth_method=smoothing)
    statistics = []
    for prediction, texts in zip(predictions, references, strict=True):
        found = scorer.corpus_score([prediction], [[text] for text in texts])
        statistics.append([*found.counts, *found.totals, found.sys_len, found.ref_len])

    def value(total: np.ndarray) -> float:
        *counts, length, reference_length = (round(number) for number in total)
        score = BLEU.compute_bleu(counts[:4], counts[4:], length, reference_length, smooth_method=smoothing).score
        return min(score, 100.0)  # exp(log(..)) overshoots in its last digit

    return Sums(np.asarray(statistics, dtype=np.float64), value)


def ter(predictions: Texts, references: References) -> Sums:
    """Corpus TER of texts in tokens, 0 and up, in percent: edits to the nearest reference over the average length.

    That is tercom's definition for several references; case is ignored, punctuation counts, nothing is tokenised.
    """
    scorer = TER(normalized=False, no_punct=False, case_sensitive=False)
    statistics = []
    for prediction, texts in zip(predictions, references, strict=True):
        found = scorer.corpus_score([prediction], [[text] for text in texts])
        statistics.append([found.num_edits, found.ref_length])

    def value(total: np.ndarray) -> float:
        edits, length = total
        return 100.0 * edits / length if length else 100.0 * (edits > 0)

    return Sums(np.asarray(statistics, dtype=np.float64), value)


def nist(predictions: Texts, references: References) -> Sums:
    """Corpus NIST-5 as mteval-v13a defines it, of lower-cased texts in its tokens.

    score = penalty * sum over n of (info of the matched n-grams / n-grams predicted)
    info(w1..wn) = log2(count(w1..wn-1) / count(w1..wn)), counted over all references; words over their number for n = 1
    penalty = exp(-beta * log(min(1, length / average length of the references))**2)

    A match is clipped to the most often that one reference has it. For intervals the info of n-grams stays that of all
    references; what is resampled are matches and lengths.
    """
    tokenise = Tokenizer13a()
    hypotheses = [tokenise(text.lower()).split() for text in predictions]
    targets = [[tokenise(text.lower()).split() for text in texts] for texts in references]
    counts: Counter[tuple[str, ...]] = Counter()
    for tokens in (tokens for texts in targets for tokens in texts):
        counts[()] += len(tokens)
        for order in range(1, _NIST_ORDER + 1):
            counts.update(_ngrams(tokens, order))
    statistics = []
    for hypothesis, texts in zip(hypotheses, targets, strict=True):
        infos, totals = [], []
        for order in range(1, _NIST_ORDER + 1):
            allowed: Counter[tuple[str, ...]] = Counter()
            for tokens in texts:
                allowed |= _ngrams(tokens, order)
            matched = _ngrams(hypothesis, order) & allowed
            infos.append(sum(hits * math.log2(counts[gram[:-1]] / counts[gram]) for gram, hits in matched.items()))
            totals.append(max(0, len(hypothesis) - order + 1))
        statistics.append([*infos, *totals, sum(map(len, texts)) / len(texts)])
    return Sums(np.asarray(statistics, dtype=np.float64), _nist_value)


def _nist_value(total: np.ndarray) -> float:
    infos, totals, reference_length = total[:_NIST_ORDER], total[_NIST_ORDER:-1], total[-1]
    if not totals[0] or not reference_length:
        return 0.0
    penalty = math.exp(-_NIST_BETA * math.log(min(1.0, totals[0] / reference_length)) ** 2)
    return penalty * sum(float(info / count) for info, count in zip(infos, totals, strict=True) if count)


def _ngrams(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[start:] for start in range(order)), strict=False))

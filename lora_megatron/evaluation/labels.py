# SPDX-License-Identifier: Apache-2.0
"""Classification as the training saw it: how likely is each label as the whole target, end token and all?

    log p(label | prompt) = sum over the label's tokens and the end token of log p(token | prompt, those before)

in fp32, over the ids that the tokenizer knows, and not divided by the number of tokens: targets compete as wholes.
The prompt is run once; then all labels of all rows go on side by side over copies of its keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_megatron.evaluation.decoder import Decoder, Pick


def label_scores(
    decoder: Decoder, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> list[list[float]]:
    """For each prompt (none empty) the log-likelihood of each label (tokens, the last the end token); collective."""
    first = [label[0] for label in labels]
    picked = decoder.start(prompts, lambda logits: logits.log_softmax(-1)[:, first], (len(prompts), len(labels)))
    totals: list[list[float]] = picked.tolist()
    alive = [(row, label) for row in range(len(prompts)) for label in range(len(labels)) if len(labels[label]) > 1]
    places = [row for row, _ in alive]
    step = 1
    while alive:
        decoder.select(places)
        wanted = torch.tensor([labels[label][step] for _, label in alive])
        picked = decoder.advance([labels[label][step - 1] for _, label in alive], _of_each(wanted), (len(alive),))
        for (row, label), value in zip(alive, picked.tolist(), strict=True):
            totals[row][label] += value
        step += 1
        places = [place for place, (_, label) in enumerate(alive) if len(labels[label]) > step]
        alive = [alive[place] for place in places]
    return totals


def _of_each(wanted: Tensor) -> Pick:
    """Picks the log probability of one token [b] in each row."""
    return lambda logits: logits.log_softmax(-1).gather(1, wanted.to(logits.device)[:, None])[:, 0]

# SPDX-License-Identifier: Apache-2.0
"""One number of a task on a live model, such as the BLEU of held-out rows by which a checkpoint is chosen."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from megatron.core.models.gpt import GPTModel

from lora_megatron.data.tokenizer import Tokenizer
from lora_megatron.errors import ConfigError
from lora_megatron.evaluation.answering import Answering, Choosing, Continuing
from lora_megatron.evaluation.answers import answers
from lora_megatron.evaluation.decoder import decoding
from lora_megatron.evaluation.rows import Instance, prompts_of
from lora_megatron.evaluation.settings import Decoding
from lora_megatron.metrics.tasks import TASKS, score
from lora_megatron.parallel.agree import gather_text, is_main, together


def answering_of(task: str, settings: Decoding, tokenizer: Tokenizer, *, positions: int, cut: bool) -> Answering:
    """How the rows of a task are answered: its labels are compared, or a text is generated."""
    if TASKS[task].kind == "classify":
        return Choosing(tuple(TASKS[task].labels), tokenizer, positions, cut)
    return Continuing(settings, tokenizer, positions, cut)


def task_metric(
    chunks: Sequence[GPTModel],
    rows: Sequence[Instance],
    *,
    task: str,
    metric: str,
    settings: Decoding,
    tokenizer: Tokenizer,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> float:
    """The metric of the model's answers to `rows`, the same on all ranks; collective over all of them.

    chunks: this rank's, without DDP; in evaluation mode meanwhile, afterwards as they were. Prompts that are too long
    lose their beginning, as in training. batch_size: prompts a rank decodes together; None: see `Decoding.batch_size`.
    on_batch: see `answers`.

    Raises:
        ConfigError: no such metric of this task here.
        Preempted: a termination signal came meanwhile.
        NumericalError: a logit is not finite.
    """
    positions = chunks[0].max_sequence_length
    answering = answering_of(task, settings, tokenizer, positions=positions, cut=True)
    prompts = answering.fit(prompts_of(rows, tokenizer))
    size = batch_size or answering.batch_size()
    with decoding(chunks, vocab_size=tokenizer.vocab_size) as decoder:
        parts = answers(decoder, prompts, answering, batch_size=size, on_batch=on_batch)
        found = [answer for part in parts for answer in part]
    predictions = [str(answer["prediction"]) for answer in found]
    value = together(lambda: _value(task, metric, predictions, rows, tokenizer) if is_main() else 0.0)
    return float(json.loads(gather_text(json.dumps(value))[0]))


def _value(task: str, metric: str, predictions: Sequence[str], rows: Sequence[Instance], tokenizer: Tokenizer) -> float:
    metas = [row.meta for row in rows]
    references = [row.spoken_references(tokenizer) for row in rows]
    scores = score(task, predictions, references, metas=None if None in metas else metas, bootstrap=0)
    if metric not in scores.values:
        why = scores.unavailable.get(metric, f"there are {', '.join(scores.values)}")
        raise ConfigError(f"no metric {metric!r} of task {task} here: {why}")
    return scores.values[metric]

# SPDX-License-Identifier: Apache-2.0
"""Answers to many prompts: batches of like lengths, shared by the data-parallel ranks, handed out in order.

Prompts are taken in windows of some batches and sorted by length within each, so that few positions are padding. What
is answered is handed out, and so kept, a window at a time: large batches make windows of few. Windows begin at fixed
rows: one that is resumed in the middle computes the same batches again, bit by bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from megatron.core import parallel_state as mpu

from lora_megatron.errors import NumericalError
from lora_megatron.evaluation.answering import Answer, Answering
from lora_megatron.evaluation.decoder import Decoder
from lora_megatron.evaluation.rows import Prompt
from lora_megatron.parallel.agree import gather_text, together
from lora_megatron.parallel.stopping import stop_if_asked

_BATCHES_PER_WINDOW = 8
_ROWS_PER_WINDOW = 256
"""At most, if a batch has no more: what an evaluation that is killed computes anew."""


def answers(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    answering: Answering,
    *,
    batch_size: int,
    first: int = 0,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> Iterator[list[Answer]]:
    """Answers from row `first` on, some rows at a time, in order, on every rank; collective over all of them.

    on_batch: called with the number of rows that all ranks have answered since it was called last.

    Raises:
        Preempted: a termination signal; what was handed out is done.
        NumericalError: a logit is not finite; on all ranks.
    """
    data_rank, data_size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    per_window = max(1, min(_BATCHES_PER_WINDOW, _ROWS_PER_WINDOW // batch_size))
    window = batch_size * per_window
    share = window * -(-data_size // per_window)  # so many rows that every rank has a batch
    for start in range(first // window * window, len(prompts), share):
        stop = min(start + share, len(prompts))
        batches = [
            batch
            for begin in range(start, stop, window)
            for batch in _batches(prompts, range(begin, min(begin + window, stop)), batch_size)
        ]
        mine: dict[int, Answer] = {}
        failure: NumericalError | None = None
        for turn in range(0, len(batches), data_size):
            stop_if_asked()
            if turn + data_rank < len(batches) and failure is None:
                rows = batches[turn + data_rank]
                try:
                    mine.update(zip(rows, answering.answer(decoder, [prompts[row] for row in rows]), strict=True))
                except NumericalError as error:
                    failure = error
            on_batch(sum(map(len, batches[turn : turn + data_size])))
        together(partial(_raise, failure))
        done = mine if data_size == 1 else _of_all_ranks(mine)
        yield [done[row] for row in range(max(start, first), stop)]


def _batches(prompts: Sequence[Prompt], rows: range, size: int) -> list[list[int]]:
    """The rows, longest prompt first: what does not fit into memory shows at once."""
    ordered = sorted(rows, key=lambda row: (-len(prompts[row].ids), row))
    return [ordered[begin : begin + size] for begin in range(0, len(ordered), size)]


def _raise(failure: NumericalError | None) -> None:
    if failure is not None:
        raise failure


def _of_all_ranks(mine: dict[int, Answer]) -> dict[int, Answer]:
    """Of each copy of the model one rank says what it has."""
    speaks = mpu.get_tensor_model_parallel_rank() == 0 and mpu.get_pipeline_model_parallel_rank() == 0
    texts = gather_text(json.dumps(list(mine.items())) if speaks else "")
    return {row: answer for text in texts if text for row, answer in json.loads(text)}

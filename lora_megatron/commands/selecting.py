# SPDX-License-Identifier: Apache-2.0
"""What `train.best` means: the number by which a run's evaluations are compared."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.distributed import DistributedDataParallel

from lora_megatron.config import Config
from lora_megatron.data.parquet import open_examples
from lora_megatron.data.tokenizer import Tokenizer
from lora_megatron.errors import ConfigError
from lora_megatron.evaluation.defaults import decoding_of
from lora_megatron.evaluation.rows import Instance, instances_of
from lora_megatron.evaluation.task_metric import task_metric
from lora_megatron.measure.rows_progress import RowsProgress
from lora_megatron.metrics.tasks import TASKS, score
from lora_megatron.parallel.agree import is_main
from lora_megatron.training.selection import Selection

NONE, LOSS = "none", "loss"
METRICS = tuple(f"{task.name}.{metric}" for task in TASKS.values() for metric in task.metrics)
_LESS_IS_BETTER = ("ter",)
_TRIED_ROWS = 2


def check_selection(config: Config) -> None:
    """Raise ConfigError where `train.best` is unknown, or there is nothing to choose between."""
    name = config.train.best
    if name not in (NONE, LOSS, *METRICS):
        raise ConfigError(f"train.best = {name} is unknown: use one of {', '.join((NONE, LOSS, *METRICS))}")
    if name == NONE:
        return
    if config.data.validation is None:
        raise ConfigError(f"train.best = {name} needs rows to evaluate: give data.validation, or set train.best=none")
    if config.train.eval_every == 0:
        raise ConfigError(
            f"train.best = {name} chooses between evaluations, and train.eval_every = 0 makes one only: set it to a "
            "number of steps, or to epoch"
        )


def open_selection(config: Config, tokenizer: Tokenizer) -> Selection | None:
    """What a configuration that was checked chooses by, its rows read; None where no best is kept.

    Raises:
        ConfigError: the metric cannot be computed here, or not of these rows.
        DataError: the rows have no references.
    """
    name = config.train.best
    if name == NONE:
        return None
    if name == LOSS:
        return Selection(name)
    assert config.data.validation is not None
    task, _, metric = name.partition(".")
    table = open_examples(config.data.validation, with_references=True)
    # A label is not one of several texts for a context: see `commands.evaluate`.
    rows = instances_of(table, group=TASKS[task].kind == "generate")
    _require_metric(task, metric, rows[:_TRIED_ROWS])
    settings = decoding_of(task, {})

    def measure(chunks: Sequence[DistributedDataParallel]) -> float:
        bare = [chunk.module for chunk in chunks]
        with RowsProgress(len(rows), description=name, enabled=is_main(), bar=False) as progress:
            return task_metric(
                bare,
                rows,
                task=task,
                metric=metric,
                settings=settings,
                tokenizer=tokenizer,
                on_batch=progress.advance,
            )

    return Selection(name, higher_is_better=metric not in _LESS_IS_BETTER, measure=measure)


def _require_metric(task: str, metric: str, rows: Sequence[Instance]) -> None:
    """Score the references of some rows, so that what is missing shows now and not after the first epoch."""
    metas = [row.meta for row in rows]
    answers = [row.references[0] if row.references else "" for row in rows]
    references = [row.references for row in rows]
    found = score(task, answers, references, metas=None if None in metas else metas, bootstrap=0)
    if metric not in found.values:
        why = found.unavailable.get(metric, f"there are {', '.join(found.values)}")
        raise ConfigError(f"train.best = {task}.{metric} cannot be computed here: {why}")

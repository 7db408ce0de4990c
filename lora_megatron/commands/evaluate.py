# SPDX-License-Identifier: Apache-2.0
"""`lora-megatron evaluate`: configuration and adapter -> model -> predictions.jsonl -> scores.json and a table."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lora_megatron.commands.decoding_model import ADVICE, DecodingModel, plan_model, say
from lora_megatron.commands.joined import joined
from lora_megatron.commands.run_lock import RunLock
from lora_megatron.commands.score import print_scores
from lora_megatron.config import Config
from lora_megatron.data.parquet import ExampleTable, open_examples
from lora_megatron.errors import ConfigError, DataError, Preempted
from lora_megatron.evaluation.answering import Answering
from lora_megatron.evaluation.answers import answers
from lora_megatron.evaluation.decoder import decoding
from lora_megatron.evaluation.predictions import PREDICTIONS, SCORES, PredictionLog, require_free
from lora_megatron.evaluation.rows import Instance, Prompt, instances_of, prompts_of
from lora_megatron.evaluation.settings import Decoding
from lora_megatron.evaluation.task_metric import answering_of
from lora_megatron.measure.atomic import write_json
from lora_megatron.measure.rows_progress import RowsProgress
from lora_megatron.metrics.tasks import TASKS, check_labels, check_resampling, score
from lora_megatron.parallel.agree import gather_text, is_main, require_equal, together
from lora_megatron.parallel.heartbeat import beat
from lora_megatron.parallel.stopping import stop_if_asked
from lora_megatron.parallel.watchdog import Watchdog


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What the command line says besides the configuration."""

    task: str
    out: Path
    decoding: Decoding
    adapter: Path | None = None
    data: Path | None = None
    """A Parquet file, or the folder of a prepared data set."""
    split: str | None = None
    limit: int | None = None
    batch_size: int | None = None
    cut_prompts: bool = False
    bootstrap: int = 1000

    def __post_init__(self) -> None:
        """Raises ConfigError for counts that cannot be."""
        for flag, value, least in (
            ("limit", self.limit, 1),
            ("batch-size", self.batch_size, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"--{flag} {value} cannot be: give {least} or more")
        check_resampling(bootstrap=self.bootstrap)


class EvaluationStopped(Preempted):
    """A termination signal; the predictions that stand in `folder` stay."""

    def __init__(self, signal: str, folder: Path, done: int) -> None:
        super().__init__(signal)
        self._folder, self._done = folder, done

    def __str__(self) -> str:
        where = f"{self._done} predictions in {self._folder / PREDICTIONS}"
        return f"{self.signal} stopped the evaluation ({where}): go on with the same command"


def run_evaluation(config: Config, options: EvaluationOptions) -> None:
    """Predict and score the rows of a task, on all ranks torchrun started (one under plain python).

    Raises:
        UserError: every way a user's input can fail; see `lora_megatron.errors` for the exit statuses.
        EvaluationStopped: a termination signal; the same command goes on.
    """
    if options.task not in TASKS:
        raise ConfigError(f"--task {options.task} is not known: choose one of {', '.join(TASKS)}")
    with joined(config, **ADVICE):
        require_equal("the command line", repr(options))
        plan = together(lambda: _plan(config, options))
        require_equal("the data", plan.table.content_hash)
        model = plan_model(config, options.adapter)
        answering, prompts = together(lambda: _fit(model, plan, options))
        identity = _identity(model, plan, options)
        lock = together(lambda: _claim(options.out, identity) if is_main() else None)
        with lock or contextlib.nullcontext():
            _evaluate(model, plan, prompts, answering, identity, options)


@dataclass(frozen=True)
class _Plan:
    """The rows of an evaluation."""

    table: ExampleTable
    instances: list[Instance]

    @property
    def ids(self) -> list[str]:
        return [instance.id for instance in self.instances]


def _plan(config: Config, options: EvaluationOptions) -> _Plan:
    table = _table(config, options)
    group = TASKS[options.task].kind == "generate"  # a label is not one of several texts for a context
    if table.rendered and not group:
        raise DataError(
            f"{table.path} was rendered by a chat template, and the labels of {options.task} stand alone: prepare it "
            "without --chat-template, or evaluate it as --task text"
        )
    instances = instances_of(table, group=group, limit=options.limit)
    check_labels(options.task, (instance.references for instance in instances))
    return _Plan(table, instances)


def _table(config: Config, options: EvaluationOptions) -> ExampleTable:
    """The file of --data and --split, by default the configuration's validation data."""
    path = options.data
    if path is None:
        if config.data.validation is None:
            raise ConfigError("no rows to evaluate: give --data a Parquet file, or set data.validation")
        path = Path(config.data.validation)
        path = path if options.split is None else path.parent
    if path.is_dir():
        path = path / f"{options.split or 'test'}.parquet"
    elif options.split is not None:
        raise ConfigError(f"--split {options.split} with --data {path}: it takes the folder of a prepared data set")
    return open_examples(path, with_references=True)


def _fit(model: DecodingModel, plan: _Plan, options: EvaluationOptions) -> tuple[Answering, list[Prompt]]:
    plan.table.check_tokenizer(model.tokenizer)
    answering = answering_of(
        options.task, options.decoding, model.tokenizer, positions=model.positions, cut=options.cut_prompts
    )
    return answering, answering.fit(prompts_of(plan.instances, model.tokenizer))


def _identity(model: DecodingModel, plan: _Plan, options: EvaluationOptions) -> dict[str, Any]:
    """What decides about the predictions; neither the layout nor the batch size is part of it."""
    kind = TASKS[options.task].kind
    how = options.decoding.to_dict() if kind == "generate" else {"labels": list(TASKS[options.task].labels)}
    return {
        "task": options.task,
        **how,
        "rows": len(plan.instances),
        "data": plan.table.content_hash,
        "base": model.base.fingerprint,
        "adapter": model.adapter_hash,
        "tokenizer": model.tokenizer.fingerprint,
        "precision": model.config.train.precision,
        "storage": model.config.base.storage,
        "gemm": model.config.base.gemm,
        **({"head": "fp8"} if model.config.base.head == "fp8" else {}),
        **({"fast_accum": "none"} if model.config.base.fast_accum == "none" else {}),  # nothing runs backward here
        "cut_prompts": options.cut_prompts,
    }


def _claim(folder: Path, identity: dict[str, Any]) -> RunLock:
    require_free(folder, identity)  # before a lock is written into what may be anybody's
    lock = RunLock(folder, key="--out")
    try:
        require_free(folder, identity)
    except BaseException:
        lock.release()
        raise
    return lock


def _evaluate(
    model: DecodingModel,
    plan: _Plan,
    prompts: Sequence[Prompt],
    answering: Answering,
    identity: dict[str, Any],
    options: EvaluationOptions,
) -> None:
    log = together(lambda: PredictionLog(options.out, identity, plan.ids) if is_main() else None)
    try:
        done = int(gather_text(str(len(log.answers)) if log else "")[0])
        if done:
            say(f"{done} of {len(prompts)} predictions stand in {options.out / PREDICTIONS}")
        if done < len(prompts):
            _predict(model, prompts, answering, done, log, options)
    except Preempted as preempted:
        stand = int(gather_text(str(len(log.answers)) if log else "")[0])
        raise EvaluationStopped(preempted.signal, options.out, stand) from None
    finally:
        if log is not None:
            log.close()
    references = [instance.spoken_references(model.tokenizer) for instance in plan.instances]
    together(lambda: _score(plan, references, log, identity, options) if log else None)


def _predict(
    model: DecodingModel,
    prompts: Sequence[Prompt],
    answering: Answering,
    done: int,
    log: PredictionLog | None,
    options: EvaluationOptions,
) -> None:
    """The predictions that are not there yet, into the log of rank 0."""
    chunks, ranks = model.build()
    stop_if_asked()
    say(f"evaluating {model.describe()} on {len(prompts)} row{'s'[: len(prompts) != 1]} of {options.task}")
    beat("decode")
    watchdog = Watchdog(
        options.out,
        rank=ranks.rank,
        world_size=ranks.world_size,
        hang_seconds=60 * model.config.run.hang_minutes,
        in_order=ranks.pipeline_size == 1,
        record=lambda message: None,
    )
    size = options.batch_size or answering.batch_size()
    progress = RowsProgress(len(prompts), first=done, description=options.task, enabled=is_main())
    with watchdog, progress, decoding(chunks, vocab_size=model.tokenizer.vocab_size) as decoder:
        parts = answers(decoder, prompts, answering, batch_size=size, first=done, on_batch=progress.advance)
        for part in parts:
            together(partial(log.append, part) if log else lambda: None)


def _score(
    plan: _Plan,
    references: Sequence[Sequence[str]],
    log: PredictionLog,
    identity: dict[str, Any],
    options: EvaluationOptions,
) -> None:
    """scores.json, in one step, and the table; on rank 0."""
    metas = [instance.meta for instance in plan.instances]
    scores = score(
        options.task,
        [str(answer["prediction"]) for answer in log.answers],
        references,
        metas=None if None in metas else metas,
        bootstrap=options.bootstrap,
    )
    write_json(
        options.out / SCORES,
        {"task": options.task, **scores.to_dict(), "bootstrap": options.bootstrap, "evaluation": identity},
    )
    print_scores(options.task, scores)
    print(f"written: {options.out / SCORES}, {options.out / PREDICTIONS}")

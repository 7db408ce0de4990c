# SPDX-License-Identifier: Apache-2.0
"""`lora-megatron bench`: methods side by side on the ranks torchrun started; a report of their speed and memory."""

from __future__ import annotations

import difflib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lora_megatron.bench.measurement import Case, Effort
from lora_megatron.bench.report import FILES, KIND, print_bench, write_bench
from lora_megatron.bench.slices import check_layers, unit_of
from lora_megatron.bench.suite import Question, Suite
from lora_megatron.bench.workload import Load, bench_config, method_of, slice_of
from lora_megatron.checkpoint.folder import disk_errors
from lora_megatron.commands.base import RANDOM, check_shape, stored_base, tokenizer_of
from lora_megatron.config import Config, ModelSection
from lora_megatron.data.tokenizer import load_tokenizer
from lora_megatron.errors import ConfigError
from lora_megatron.measure.atomic import write_json, write_text
from lora_megatron.measure.console import TrainingProgress
from lora_megatron.measure.environment import describe_environment
from lora_megatron.measure.report_folder import claim_folder
from lora_megatron.measure.units import show_bytes
from lora_megatron.methods.choose import METHODS
from lora_megatron.model.checks import check, check_plan, layout_of
from lora_megatron.model.presets import resolve_shape
from lora_megatron.model.shape import ModelShape
from lora_megatron.parallel import groups
from lora_megatron.parallel.agree import is_main, require_equal, together
from lora_megatron.parallel.groups import device_memory_bytes
from lora_megatron.parallel.world import in_world
from lora_megatron.training.loop import StepReport


def run_bench(
    config: Config,
    *,
    methods: Sequence[str],
    steps: int,
    warm_up: int,
    layers: int | None,
    out: str,
    visits: int = 2,
    profiled: int = 0,
    ceiling: bool = True,
) -> None:
    """Measure `methods` on the configured model, layout and batches, and write the report into `out`.

    methods: names as in `method.name`. steps: measured ones of each method. layers: of a slice; None: as many as fit.
    visits: to each method, 1 or 2. profiled: steps to profile at the end of each visit. ceiling: whether the matrix
    products are timed alone.

    Raises:
        ConfigError: an argument or the configuration cannot work, or nothing fits.
        CheckpointError: the stored base or the folder cannot be used.
        LostRankError: another rank does not answer any more, or this one ran out of memory.
        NumericalError: a step made no update.
    """
    methods = _checked(methods, Effort(steps, warm_up, profiled))
    with in_world(timeout_minutes=config.parallel.timeout_minutes, streams_wait=config.parallel.pp_comm_copy):
        _bench(config, methods, Effort(steps, warm_up, profiled), layers, visits, ceiling, Path(out))


def _bench(
    config: Config,
    methods: Sequence[str],
    effort: Effort,
    layers: int | None,
    visits: int,
    ceiling: bool,
    folder: Path,
) -> None:
    require_equal("the configuration", config.model_dump_json())
    shape, load = together(lambda: _model(config))
    config = config.model_copy(update={"model": ModelSection(**shape.to_dict())})
    question = Question(config, shape, methods, effort, layers, load, visits, ceiling)
    together(lambda: _check(question))
    together(lambda: _claim(folder) if is_main() else None)
    _measure(question, folder)


def _checked(methods: Sequence[str], effort: Effort) -> list[str]:
    names = [name.strip() for name in methods]
    for name in names:
        if name not in METHODS:
            nearest = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown method {name!r} in --methods: did you mean {nearest}? (valid: {_names()})")
        if names.count(name) > 1:
            raise ConfigError(f"--methods names {name} twice: list each method once")
    if effort.steps < 1:
        raise ConfigError(f"--steps {effort.steps}: at least 1 step has to be measured")
    for flag, count in (("--warm-up", effort.warm_up), ("--profile", effort.profiled)):
        if count < 0:
            raise ConfigError(f"{flag} {count}: must be 0 or more")
    return names


def _names() -> str:
    return ", ".join(METHODS)


def _model(config: Config) -> tuple[ModelShape, Load | None]:
    """The shape and how to fill it; a tokenizer is opened only where the vocabulary is not known without."""
    if config.base.weights != RANDOM:
        base = stored_base(config)
        check_shape(config, base, vocab_size=base.shape.vocab_size)
        return base.shape, base.load
    vocabulary = config.model.vocab_size or load_tokenizer(tokenizer_of(config)).vocab_size
    return resolve_shape(config.model, tokenizer_vocab_size=vocabulary), None


def _check(question: Question) -> None:
    """What `train` checks but for the memory of all layers: on the smallest slice, if the pipeline lets one be cut."""
    shape, unit = question.shape, unit_of(question.config)
    if question.layers is not None:
        check_layers(question.layers, question.config, all_layers=shape.num_layers)
    smallest = shape if shape.num_layers % unit else slice_of(shape, unit)
    for name in question.methods:
        config = bench_config(question.config, name)
        if config.train.recompute_layers is not None:  # of the whole model's layers
            check_plan(config, shape, method_of(config, shape), dist.get_world_size())
            config = config.model_copy(update={"train": config.train.model_copy(update={"recompute_layers": None})})
        check(config, smallest, method_of(config, shape), dist.get_world_size())


def _claim(folder: Path) -> None:
    with disk_errors(folder):
        claim_folder(folder, kind=KIND, files=FILES)


def _measure(question: Question, folder: Path) -> None:
    config = question.config
    ranks = groups.build_mesh(
        layout_of(config), seed=config.train.seed, timeout_minutes=config.parallel.timeout_minutes
    )
    suite = Suite.start(question, ranks)
    environment = describe_environment()
    if ranks.is_main:
        with disk_errors(folder):
            write_text(folder / "config.yaml", config.to_yaml())
            write_json(folder / "environment.json", environment)
    total = sum(effort.steps for _, effort in suite.order)
    progress = TrainingProgress(total, enabled=ranks.is_main, description="bench")
    done = 0

    def on_visit(case: Case) -> None:
        planned = show_bytes(max(kinds["peak"] for kinds in suite.known[case].planned))
        progress.note(f"{case}, visit {len(suite.visits.get(case, ())) + 1}: {planned} on the largest rank by the plan")

    def on_step(report: StepReport) -> None:
        nonlocal done
        done += 1
        rate = report.tokens_per_second_per_rank * ranks.world_size
        progress.update(done, loss=report.loss, lr=report.lr, tokens_per_second=rate)

    def on_result() -> None:
        together(lambda: _write(suite, folder, environment) if ranks.is_main else None)

    with progress:
        suite.run(on_visit=on_visit, on_step=on_step, on_result=on_result)
    if ranks.is_main:
        print_bench(_result(suite, environment))
        print(f"report: {folder / 'report.md'}", file=sys.stderr, flush=True)


def _write(suite: Suite, folder: Path, environment: dict[str, Any]) -> None:
    with disk_errors(folder):
        write_bench(folder, _result(suite, environment))


def _result(suite: Suite, environment: dict[str, Any]) -> dict[str, Any]:
    """The suite's result with what a reader must know of the setting."""
    question, ranks = suite.question, suite.ranks
    config = question.config
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    data = config.data.model_dump(include={"sequence_length", "micro_batch_size", "global_batch_size", "packing"})
    return {
        **suite.result(),
        "command": shlex.join(["lora-megatron", *sys.argv[1:]]),
        "shape": question.shape.to_dict(),
        "layout": {**config.parallel.model_dump(exclude={"timeout_minutes"}), "data": ranks.data_size},
        "world_size": ranks.world_size,
        "device": device,
        "device_memory_bytes": device_memory_bytes(),
        "precision": config.train.precision,
        "weights": RANDOM if question.load is None else config.base.weights,
        "data": data,
        "steps": question.effort.steps,
        "warm_up": question.effort.warm_up,
        "visits": question.visits,
        "config": config.model_dump(mode="json", exclude_none=True),
        "environment": environment,
    }

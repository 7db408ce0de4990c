# SPDX-License-Identifier: Apache-2.0
"""`lora-megatron train`: configuration -> groups -> data -> method -> model -> base -> optimizer -> loop -> report."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lora_megatron.checkpoint.adapter import describe_method, load_adapter
from lora_megatron.checkpoint.base import Base
from lora_megatron.checkpoint.folder import MANIFEST
from lora_megatron.commands import run_folder
from lora_megatron.commands.base import resolve_base, tokenizer_of
from lora_megatron.commands.best import BEST_NAME, drop_unneeded, recall_best, save_trained
from lora_megatron.commands.grace import checkpoint_bytes
from lora_megatron.commands.history import restore, resume
from lora_megatron.commands.joined import joined
from lora_megatron.commands.preflight import check_disk, preflight, settle_recomputation
from lora_megatron.commands.recording import on_disk, on_main_disk, train_and_record
from lora_megatron.commands.run_lock import RunLock
from lora_megatron.commands.selecting import check_selection, open_selection
from lora_megatron.commands.summary import Run, continuations, summarise
from lora_megatron.config import Config, ModelSection
from lora_megatron.data.batches import BatchSource
from lora_megatron.data.parquet import ExampleTable, open_examples
from lora_megatron.data.tokenizer import Tokenizer, load_tokenizer
from lora_megatron.errors import CheckpointError, ConfigError, LostRankError
from lora_megatron.measure.memory import ActivationMeter
from lora_megatron.measure.report import write_report
from lora_megatron.methods.choose import choose_method
from lora_megatron.methods.method import Method
from lora_megatron.model.build import build
from lora_megatron.model.checks import check, layout_of, options_of
from lora_megatron.model.storage import storage_of
from lora_megatron.parallel import groups
from lora_megatron.parallel.agree import gather_text, is_main, require_equal, together
from lora_megatron.parallel.groups import Ranks
from lora_megatron.parallel.heartbeat import beat
from lora_megatron.parallel.launcher import launcher_identity
from lora_megatron.parallel.peers import loss_as_error
from lora_megatron.parallel.stopping import stop_if_asked
from lora_megatron.parallel.watchdog import Watchdog
from lora_megatron.training.choose_optimizer import choose_optimizer
from lora_megatron.training.cuda_graph import StepGraph
from lora_megatron.training.length import show_length
from lora_megatron.training.loop import Trainer
from lora_megatron.training.optimizer import wrap_ddp


def run_training(config: Config) -> None:
    """Train as configured, on all ranks torchrun started (one under plain python).

    Raises:
        UserError: every way a user's input can fail; see `lora_megatron.errors` for the exit statuses.
        Preempted: a termination signal; the run can go on from where it stands.
    """
    with joined(config):
        _prepare_and_train(config, time.monotonic())


def _prepare_and_train(config: Config, started: float) -> None:
    launchers = sorted(set(gather_text(launcher_identity())))
    config, restarted = run_folder.resume_if_restarted(config, launchers)
    plan = together(lambda: _plan(config))
    require_equal("the tokenizer", plan.tokenizer.fingerprint)
    require_equal("the base model", plan.base.fingerprint)
    stop_if_asked()
    lock = together(lambda: run_folder.claim(config, restarted=restarted) if is_main() else None)
    with lock or contextlib.nullcontext(), run_folder.ending_recorded(config, enabled=is_main()), loss_as_error():
        _warn_without_lock(lock, config)
        timeout = config.parallel.timeout_minutes
        ranks = groups.build_mesh(layout_of(config), seed=config.train.seed, timeout_minutes=timeout)
        with _watchdog(config, ranks), loss_as_error():
            _train(plan, ranks, launchers, started)


def _watchdog(config: Config, ranks: Ranks) -> Watchdog:
    def record(message: str) -> None:
        run_folder.set_status(config, "failed", exit_status=LostRankError.exit_status, error=message)

    return Watchdog(
        Path(config.run.dir),
        rank=ranks.rank,
        world_size=ranks.world_size,
        hang_seconds=60 * config.run.hang_minutes,
        in_order=ranks.pipeline_size == 1,
        record=record,
    )


@dataclass(frozen=True)
class _Plan:
    """What a configuration comes to, before anything is built."""

    config: Config
    tokenizer: Tokenizer
    base: Base
    method: Method


def _plan(config: Config) -> _Plan:
    name = tokenizer_of(config)
    tokenizer = load_tokenizer(name)
    config = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": name})})
    base = resolve_base(config, tokenizer)
    config = config.model_copy(update={"model": ModelSection(**base.shape.to_dict())})
    method = choose_method(config.method, num_layers=base.shape.num_layers)
    check(config, base.shape, method, dist.get_world_size())
    check_selection(config)
    _check_start(config.method.start_from)
    return _Plan(config, tokenizer, base, method)


def _check_start(start_from: str | None) -> None:
    if start_from is None or (Path(start_from) / MANIFEST).is_file():
        return
    inside = Path(start_from) / "adapter"
    otherwise = "give the folder `adapter` of a run, or what `lora-megatron import` makes of PEFT's"
    hint = f"did you mean {inside}?" if inside.is_dir() else otherwise
    raise CheckpointError(f"method.start_from = {start_from} is not the folder of an adapter: {hint}")


def _open(path: str | None, key: str) -> ExampleTable:
    if path is None:
        raise ConfigError(f"{key} is not given: name a Parquet file (python -m data_prep makes one)")
    return open_examples(path)


def _source(table: ExampleTable, tokenizer: Tokenizer, config: Config, *, shuffle: bool) -> BatchSource:
    data = config.data
    return BatchSource(
        table,
        tokenizer,
        sequence_length=data.sequence_length,
        micro_batch_size=data.micro_batch_size,
        loss=data.loss,
        packing=data.packing,
        seed=config.train.seed,
        shuffle=shuffle,
    )


def _train(plan: _Plan, ranks: Ranks, launchers: list[str], started: float) -> None:
    config, tokenizer, base, method = plan.config, plan.tokenizer, plan.base, plan.method
    beat("load")
    table = together(lambda: _open(config.data.train, "data.train"))
    held_out_table = together(lambda: open_examples(config.data.validation) if config.data.validation else None)
    require_equal("the training data", table.content_hash)
    require_equal("the validation data", held_out_table.content_hash if held_out_table else "")
    stop_if_asked()
    say = _say if ranks.is_main else lambda text: None
    looked = time.monotonic()
    config = settle_recomputation(config, base.shape, method, say)
    found = preflight(config, base.shape, method, {"data.train": table, "data.validation": held_out_table}, say)
    looked = time.monotonic() - looked
    trainer = _build_trainer(config, tokenizer, base, method, table, held_out_table)
    identity = _identity(config, base, method, table, tokenizer)
    stop_if_asked()
    resumed = together(lambda: run_folder.find_checkpoint(config, identity, say))
    if resumed:
        resume(trainer, *resumed)
        restore(trainer, Path(config.run.dir))
        say(f"resumed from {resumed[0]} at step {resumed[1].step}")
    run = Run(config, base, method, trainer, tokenizer, held_out_table, ranks)
    size = checkpoint_bytes(run)
    found.append(on_disk(run, lambda: check_disk(config, size) if ranks.is_main else ""))
    say(f"preflight in {looked:.2f} s: {', '.join(found)}")
    trainer.best = recall_best(run, say)
    on_main_disk(run, lambda: run_folder.begin(config, trainer.step, launchers, say))
    _say_what_is_cut(trainer, say)
    if length := show_length(config, len(trainer.data)):
        say(length)
    _run(run, identity, started)


def _run(run: Run, identity: dict[str, Any], started: float) -> None:
    config, base, method, trainer = run.config, run.base, run.method, run.trainer
    facts = {
        "base": config.base.weights,
        "base_fingerprint": base.fingerprint,
        "seed": config.train.seed,
        **describe_method(method, base.shape),
    }
    train_and_record(run, identity, facts)
    beat("finish")
    folder = Path(config.run.dir)
    save_trained(run, folder / ("model" if method.trains_base else "adapter"), facts)
    run.after = continuations(run)
    summary = summarise(run, wall_seconds=time.monotonic() - started)
    on_main_disk(run, lambda: write_report(folder, summary))
    if best := trainer.best:
        on_main_disk(run, lambda: drop_unneeded(folder, best))
    on_main_disk(run, lambda: run_folder.set_status(config, "done", step=trainer.step))
    if run.ranks.is_main:
        if best:
            _say(f"best: {config.train.best} {best.value:.4f} after step {best.step}: {folder / BEST_NAME}")
        _say(f"done: {folder / 'report.md'}")


def _build_trainer(
    config: Config,
    tokenizer: Tokenizer,
    base: Base,
    method: Method,
    table: ExampleTable,
    held_out_table: ExampleTable | None,
) -> Trainer:
    chunks = build(base.shape, method, layout_of(config), options_of(config))
    together(lambda: base.load(chunks))
    if config.method.start_from is not None:
        load_adapter(Path(config.method.start_from), chunks, method, base.shape, base_fingerprint=base.fingerprint)
    graph = StepGraph() if config.train.cuda_graph else None
    ddp = wrap_ddp(chunks, sharding=config.optimizer.sharding, precision=config.train.precision, graph=graph)
    return Trainer(
        config=config,
        chunks=ddp,
        optimizer=together(
            lambda: choose_optimizer(ddp, config.optimizer, precision=config.train.precision, graph=graph)
        ),
        data=_source(table, tokenizer, config, shuffle=True),
        held_out=_source(held_out_table, tokenizer, config, shuffle=False) if held_out_table else None,
        meter=ActivationMeter(chunks),
        selection=together(lambda: open_selection(config, tokenizer)),
        graph=graph,
    )


def _identity(config: Config, base: Base, method: Method, table: ExampleTable, tokenizer: Tokenizer) -> dict[str, Any]:
    """What must be the same for a run to go on bit by bit; the layout is not part of it."""
    data = config.data
    return {
        "base_fingerprint": base.fingerprint,
        **describe_method(method, base.shape),
        "dropout": config.method.dropout,
        "data": table.content_hash,
        "tokenizer": tokenizer.fingerprint,
        "sequence_length": data.sequence_length,
        "global_batch_size": data.global_batch_size,
        "loss": data.loss,
        "packing": data.packing,
        "seed": config.train.seed,
        "precision": config.train.precision,
        **({"label_smoothing": config.train.label_smoothing} if config.train.label_smoothing else {}),
        **({"storage": config.base.storage, "gemm": config.base.gemm} if storage_of(config) else {}),
        **({"head": "fp8"} if config.base.head == "fp8" else {}),
        **({"fast_accum": config.base.fast_accum} if config.base.fast_accum not in (None, "forward") else {}),
    }


def _say_what_is_cut(trainer: Trainer, say: Callable[[str], None]) -> None:
    """Examples that lose tokens are no error, but nobody shall learn of it from a bad model."""
    for key, source in (("data.train", trainer.data), ("data.validation", trainer.held_out)):
        if source is not None and source.truncated_rows:
            say(
                f"{source.truncated_rows:,} of {source.examples:,} rows of {key} are longer than data.sequence_length "
                f"= {source.sequence_length}: their contexts lose their beginning, and targets that are still too long "
                "their end"
            )


def _warn_without_lock(lock: RunLock | None, config: Config) -> None:
    if lock is not None and not lock.supported:
        _say(f"warning: {config.run.dir} is on a file system without locks: start no second job there")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

# SPDX-License-Identifier: Apache-2.0
"""`lora-megatron plan`: what a training needs, whether it fits, and which layouts do; without data, GPU or world."""

from __future__ import annotations

import json
import math
from pathlib import Path

from lora_megatron.checkpoint.base import CONFIG
from lora_megatron.commands.base import RANDOM, tokenizer_of
from lora_megatron.commands.plan_facts import facts_of
from lora_megatron.commands.plan_tables import print_plan, print_ranking
from lora_megatron.config import Config
from lora_megatron.data.tokenizer import load_tokenizer
from lora_megatron.errors import CheckpointError, ConfigError, DataError
from lora_megatron.huggingface.base import open_base
from lora_megatron.methods.choose import choose_method
from lora_megatron.model.checks import check_plan, layout_of
from lora_megatron.model.presets import PRESETS, resolve_shape
from lora_megatron.model.shape import ModelShape
from lora_megatron.planning.gpus import Gpu, find_gpu
from lora_megatron.planning.memory import CUDA_CONTEXT
from lora_megatron.planning.plan import MEMORY_KINDS, Plan, plan_training
from lora_megatron.planning.search import Candidate, Problem, fewest_gpus, nearest_fit, search_layouts

_LARGEST_MEMORY_GB, _MOST_GPUS = 1e5, 100_000
_VOCABULARIES = {"gpt2": 50257, "gpt3": 50257, "llama2": 32000}
"""Of the released models a preset is named after, for when their tokenizer is not here."""


def run_plan(
    config: Config,
    *,
    gpus: int | None,
    gpu: str,
    gpu_memory_gb: float | None,
    data_parallel: int,
    png: str | None,
    as_json: bool,
) -> None:
    """Print the plan of `config`, or of the best layout of `gpus` GPUs after a ranking of those that fit.

    Raises:
        ConfigError: a configuration that cannot work, an argument out of bounds, or no layout of `gpus` GPUs that fits.
        CheckpointError: the base is a folder and not a model.
    """
    card = find_gpu(gpu)
    memory = _memory(gpu_memory_gb, card)
    _check_counts(gpus, data_parallel)
    shape = _shape(config)
    problem = Problem(config, shape, choose_method(config.method, num_layers=shape.num_layers), card, memory)
    ranking = _ranking(problem, gpus) if gpus is not None else []
    if ranking:
        plan = _plan(problem, ranking[0].config, ranking[0].world_size)
    else:
        plan = _plan(problem, config, layout_of(config).model_size * data_parallel)
    nearest = None if plan.chosen.fits(memory) else nearest_fit(problem, world_size=plan.world_size)
    if png is not None:
        _draw(Path(png), plan, problem)
    if as_json:
        print(json.dumps(facts_of(plan, card, memory, nearest=nearest, ranking=ranking), indent=2, allow_nan=False))
        return
    if ranking:
        print_ranking(ranking, plan, card, memory)
    print_plan(plan, card, memory, nearest=nearest)


def _memory(given_gb: float | None, gpu: Gpu) -> float:
    if given_gb is None:
        return gpu.memory
    least = CUDA_CONTEXT / 1e9
    if not math.isfinite(given_gb) or not least < given_gb <= _LARGEST_MEMORY_GB:
        raise ConfigError(
            f"--gpu-memory = {given_gb:g} GB is not the memory of a GPU: give GB (10^9 bytes) above {least:.2f}, which "
            f"CUDA's context alone takes, and up to {_LARGEST_MEMORY_GB:,.0f}"
        )
    return given_gb * 1e9


def _check_counts(gpus: int | None, data_parallel: int) -> None:
    for name, value in (("--gpus", gpus), ("--data-parallel", data_parallel)):
        if value is not None and not 1 <= value <= _MOST_GPUS:
            raise ConfigError(f"{name} = {value}: give a number from 1 to {_MOST_GPUS:,}")
    if gpus is not None and data_parallel != 1:
        raise ConfigError("--gpus searches data parallelism too: leave out --data-parallel")


def _plan(problem: Problem, config: Config, world_size: int) -> Plan:
    return plan_training(config, problem.shape, problem.method, world_size=world_size, memory=problem.memory)


def _ranking(problem: Problem, gpus: int) -> list[Candidate]:
    """The layouts of so many GPUs that fit, the fastest first; at least one.

    Raises:
        ConfigError: none fits, or none is possible; the message says how many GPUs do.
    """
    # What no layout can mend has a message of its own.
    check_plan(_smallest_cut(problem.config), problem.shape, problem.method, 1)
    if found := search_layouts(problem, world_size=gpus):
        return found
    least = fewest_gpus(problem)
    complaint = f"no layout of --gpus {gpus} with {problem.memory / 1e9:g} GB each holds this training"
    if least is None:
        raise ConfigError(f"{complaint}, nor does any of up to 4096: give more --gpu-memory or a smaller model")
    changes = least.changes(problem.config)
    overrides = " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())
    how = f" with {overrides}" if overrides else ""
    raise ConfigError(f"{complaint}: the fewest GPUs that do are {least.world_size}{how}")


def _smallest_cut(config: Config) -> Config:
    """The same training on one rank."""
    cut = {"tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "sequence": False}
    batch = {"micro_batch_size": 1}
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=cut),
            "data": config.data.model_copy(update=batch),
        }
    )


def _shape(config: Config) -> ModelShape:
    """The model's shape; neither data nor a tokenizer has to be there when the vocabulary is known without.

    Raises:
        CheckpointError: base.weights is not a model.
        ConfigError, DataError: no such preset, or the vocabulary is not known.
    """
    if config.base.weights == RANDOM:
        return resolve_shape(config.model, tokenizer_vocab_size=_vocabulary(config))
    folder = Path(config.base.weights)
    if not folder.is_dir():
        raise CheckpointError(f"base.weights = {folder} is neither {RANDOM} nor a folder")
    if not (folder / CONFIG).is_file() and (folder / "model" / CONFIG).is_file():
        raise CheckpointError(f"base.weights = {folder} is the folder of a run: did you mean {folder / 'model'}?")
    return open_base(folder).shape


def _vocabulary(config: Config) -> int:
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    try:
        return load_tokenizer(tokenizer_of(config)).vocab_size
    except DataError:
        known = (config.model.preset or "").partition("-")[0]
        if config.model.preset in PRESETS and known in _VOCABULARIES:
            return _VOCABULARIES[known]
        raise


def _draw(path: Path, plan: Plan, problem: Problem) -> None:
    from lora_megatron.measure.memory_chart import Bars, draw_memory  # matplotlib is slow to import

    def bars(name: str, ranks: object) -> Bars:
        stacks = [{kind.replace("_", " "): getattr(rank.memory, kind) for kind in MEMORY_KINDS} for rank in ranks]  # type: ignore[attr-defined]
        return Bars(name, stacks)

    methods = [bars(plan.chosen.method, plan.chosen.ranks)]
    if plan.chosen.method != plan.full.method:
        methods.append(bars(plan.full.method, plan.full.ranks))
    limit = f"{problem.gpu.name}: {problem.memory / 1e9:g} GB"
    try:
        draw_memory(
            path,
            methods,
            groups=[f"stage {rank.stage}\n{rank.count} ranks" for rank in plan.chosen.ranks],
            title=f"Planned memory of each distinct rank, {plan.world_size} GPUs",
            limit=problem.memory,
            limit_label=limit,
        )
    except OSError as error:
        raise ConfigError(f"cannot write --png {path}: {error.strerror or error}") from None

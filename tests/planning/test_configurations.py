# SPDX-License-Identifier: Apache-2.0
"""Every file of launch/configs can be read and planned, and the paper's runs fit the GPUs they are cut for."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lora_megatron.arguments import parse_arguments
from lora_megatron.config import Config, load_config
from lora_megatron.methods.choose import choose_method
from lora_megatron.methods.method import Method
from lora_megatron.model.checks import check, check_plan, layout_of
from lora_megatron.model.presets import resolve_shape
from lora_megatron.model.shape import ModelShape
from lora_megatron.planning.gpus import GPUS
from lora_megatron.planning.memory import Place, plan_rank
from lora_megatron.planning.plan import plan_training, rank_weights

FOLDER = Path(__file__).resolve().parents[2] / "launch" / "configs"
TASKS = ("gpt3_175b_wikisql", "gpt3_175b_mnli", "gpt3_175b_samsum")
LAYOUTS = sorted((FOLDER / "layouts").glob("*.yaml"))
BYTES_VOCABULARY = 258


def resolve(*files: Path, overrides: tuple[str, ...] = ()) -> tuple[Config, ModelShape, Method]:
    config = load_config(files[0], [*map(str, files[1:]), *overrides])
    shape = resolve_shape(config.model, tokenizer_vocab_size=config.model.vocab_size or BYTES_VOCABULARY)
    return config, shape, choose_method(config.method, num_layers=shape.num_layers)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_planned(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: Apache-2.0\n")
    # A base that is made or downloaded first is stood in for by a tiny one.
    elsewhere = ("base.weights=random", "model.preset=tiny") if load_config(path).base.weights != "random" else ()
    config, shape, method = resolve(path, overrides=elsewhere)
    if path.stem in TASKS:
        config = load_config(path, [str(LAYOUTS[0])])
    gpu = GPUS["h200" if path.stem.endswith(("_1gpu", "_2gpu", "_8gpu")) else "h100"]
    plan = plan_training(config, shape, method, world_size=layout_of(config).model_size, memory=gpu.memory)
    assert plan.chosen.fits(gpu.memory)
    assert plan.speed(gpu).tokens_per_second > 0


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_commands_of_every_header_are_understood(path: Path) -> None:
    header = path.read_text(encoding="utf-8").replace("\\\n#", " ")
    commands = re.findall(r"^# +lora-megatron (.*?)(?:  +# .*)?$", header, re.MULTILINE)
    for command in commands:
        arguments = parse_arguments(shlex.split(command))
        assert (FOLDER.parents[1] / arguments.config).is_file()
        files = [str(FOLDER.parents[1] / word) if word.endswith(".yaml") else word for word in arguments.overrides]
        load_config(FOLDER.parents[1] / arguments.config, files)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda path: path.stem)
def test_the_papers_runs_fit_80_gb_on_every_layout(layout: Path) -> None:
    """Three tasks and three ranks; the first stage holds most, as most microbatches are in flight there."""
    world_size = int(layout.stem.removeprefix("gpus"))
    for rank in (1, 4, 8):
        overrides = (f"method.targets={{q: {rank}, v: {rank}}}", f"method.alpha={rank}")
        weights = None
        for task in TASKS:
            config, shape, method = resolve(FOLDER / f"{task}.yaml", layout, overrides=overrides)
            check_plan(config, shape, method, world_size)
            weights = weights or rank_weights(config, shape, method, 0)
            data_size = world_size // layout_of(config).model_size
            assert data_size == 1
            plan = plan_rank(config, shape, method, weights, Place(0, 0, data_size))
            assert plan.total <= 80e9, f"{task} at rank {rank}"
            assert plan.trained_weights == 2 * 2 * rank * (12288 + 12288 // 8) * 96 // config.parallel.pipeline
            assert config.optimizer.lr == 2e-4
            assert config.data.global_batch_size == 128


def test_a_storage_other_than_the_precision_is_refused_for_training() -> None:
    config, shape, method = resolve(FOLDER / "tiny.yaml", overrides=("base.storage=bf16",))
    with pytest.raises(ValueError, match=r"not train\.precision = fp32"):
        check(config, shape, method, 1)
    config, shape, method = resolve(FOLDER / "tiny.yaml", overrides=("base.storage=bf16", "train.precision=bf16"))
    check(config, shape, method, 1)

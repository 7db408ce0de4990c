# SPDX-License-Identifier: Apache-2.0
"""`train.recompute = auto` recomputes as few layers as the memory needs, alike on all ranks, and says what it chose."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from lora_megatron.config import Config, parse_config
from lora_megatron.errors import ConfigError
from lora_megatron.methods.choose import choose_method
from lora_megatron.model.checks import check_plan, layout_of
from lora_megatron.model.presets import resolve_shape
from lora_megatron.model.shape import ModelShape
from lora_megatron.parallel import free_memory
from lora_megatron.planning.gpus import find_gpu
from lora_megatron.planning.plan import Plan, plan_training
from lora_megatron.planning.recompute import SHARE, describe, settle
from lora_megatron.planning.search import Problem, nearest_fit
from tests.commands.runs import Outcome, attempt, losses_of, make_corpus, make_tree
from tests.pool import Pool

LAYERS = 8


def config_of(**train: Any) -> tuple[Config, ModelShape]:
    tree = {
        "model": {"preset": "tiny", "num_layers": LAYERS, "vocab_size": 300},
        "data": {"sequence_length": 64},
        "train": train,
    }
    config = parse_config(tree)
    return config, resolve_shape(config.model, tokenizer_vocab_size=300)


def plan_of(memory: float, **train: Any) -> Plan:
    config, shape = config_of(**train)
    method = choose_method(config.method, num_layers=LAYERS)
    return plan_training(config, shape, method, world_size=1, memory=memory)


@pytest.mark.parametrize("needed", range(LAYERS + 1))
def test_the_fewest_that_fit(needed: int) -> None:
    config, shape = config_of(recompute="auto")
    asked = []

    def fits(tried: Config) -> bool:
        asked.append(tried)
        return (tried.train.recompute_layers or 0) >= needed

    settled = settle(config, shape, fits).train
    expected = ("none", None) if needed == 0 else ("full", needed)
    assert (settled.recompute, settled.recompute_layers) == expected
    assert len(asked) <= 4


def test_all_layers_where_nothing_fits_and_nothing_else_is_touched() -> None:
    config, shape = config_of(recompute="auto")
    assert describe(settle(config, shape, lambda tried: False)) == f"full, {LAYERS} a chunk"
    other, _ = config_of(recompute="selective")
    assert settle(other, shape, lambda tried: False) is other


def test_a_plan_fills_the_memory_it_is_given() -> None:
    """One layer fewer recomputed would not fit, by the plan of a configuration that says so."""
    none = plan_of(0, recompute="none").chosen.largest.memory.total
    all_layers = plan_of(0, recompute="full").chosen.largest.memory.total
    memory = (none + all_layers) / 2 / SHARE
    plan = plan_of(memory, recompute="auto")
    layers = plan.config.train.recompute_layers
    assert layers is not None
    assert 0 < layers < LAYERS
    assert plan.chosen.largest.memory.total <= SHARE * memory
    fewer = plan_of(0, recompute="full", recompute_layers=layers - 1)
    assert fewer.chosen.largest.memory.total > SHARE * memory
    same = plan_of(0, recompute="full", recompute_layers=layers)
    assert same.chosen == plan.chosen
    assert plan_of(2 * none, recompute="auto").config.train.recompute == "none"
    flops = [plan.chosen.flops.hardware for plan in (plan_of(0, recompute="none"), same, plan_of(0, recompute="full"))]
    assert flops == sorted(flops)
    assert len(set(flops)) == 3


def test_what_is_told_to_change_is_auto() -> None:
    """The search changes one setting where one is enough, and offers as little recomputation as fits."""
    data = {"sequence_length": 1024, "micro_batch_size": 1, "global_batch_size": 1}
    config = parse_config({"model": {"preset": "gpt2-small", "vocab_size": 50257}, "data": data})
    shape = resolve_shape(config.model, tokenizer_vocab_size=50257)
    method = choose_method(config.method, num_layers=shape.num_layers)
    needed = plan_training(config, shape, method, world_size=1).chosen.largest.memory.total
    fit = nearest_fit(Problem(config, shape, method, find_gpu("h100"), 0.9 * needed), world_size=1)
    assert fit is not None
    assert len(fit.changes(config)) == 1
    tight = config.model_copy(update={"train": config.train.model_copy(update={"recompute": "auto"})})
    fit = nearest_fit(Problem(tight, shape, method, find_gpu("h100"), 0.9 * needed), world_size=1)
    assert fit is not None
    assert fit.changes(tight) == {}
    assert 0 < (fit.settled.train.recompute_layers or 0) < shape.num_layers
    assert fit.needed <= SHARE * 0.9 * needed


@pytest.mark.parametrize(
    ("train_section", "parallel", "words"),
    [
        ({"recompute": "none", "recompute_layers": 2}, {}, ("recompute_layers = 2", "not none")),
        ({"recompute": "auto", "recompute_layers": 2}, {}, ("recompute_layers = 2", "not auto")),
        ({"recompute": "full", "recompute_layers": 9}, {}, ("recompute_layers = 9", "has 8 layers")),
        ({"recompute": "full", "recompute_unit": 3}, {}, ("recompute_unit = 3", "8 layers", "1, 2, 4, 8")),
        ({"recompute": "auto", "recompute_unit": 2}, {}, ("recompute_unit = 2", "recompute=full")),
        ({"recompute": "full", "recompute_layers": 2, "recompute_unit": 2}, {}, ("recompute_unit = 2", "all layers")),
        ({"recompute": "full", "recompute_layers": 5}, {"pipeline": 2}, ("recompute_layers = 5", "has 4 layers")),
    ],
)
def test_numbers_of_layers_that_cannot_be(
    train_section: dict[str, Any], parallel: dict[str, Any], words: tuple[str, ...]
) -> None:
    config, shape = config_of(**train_section)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})
    method = choose_method(config.method, num_layers=LAYERS)
    with pytest.raises(ConfigError) as error:
        check_plan(config, shape, method, layout_of(config).model_size)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def train_with_room(tree: dict[str, Any], free: int) -> Outcome:
    """A training whose machine has `free` bytes for all ranks."""
    with patch.object(free_memory, "available_host_memory", lambda: free):
        return attempt(tree)


def test_a_training_settles_it_and_records_it(pool: Pool, tmp_path: Path) -> None:
    """Two pipeline stages agree on what the fuller one needs; the losses are those without recomputation."""
    corpus = make_corpus(tmp_path / "corpus")

    def tree_of(name: str, how: dict[str, Any]) -> dict[str, Any]:
        return make_tree(corpus, tmp_path / name, parallel={"pipeline": 2}, train={"steps": 2, **how})

    def allocated(how: dict[str, Any]) -> int:
        config = parse_config(tree_of("planned", how))
        shape = resolve_shape(config.model, tokenizer_vocab_size=258)
        plan = plan_training(config, shape, choose_method(config.method, num_layers=4), world_size=2)
        return max(rank.memory.allocated for rank in plan.chosen.ranks)

    one = allocated({"recompute": "full", "recompute_layers": 1})
    assert allocated({"recompute": "full"}) < one < allocated({"recompute": "none"})
    for name, free, chosen in (
        ("roomy", 2**40, ("none", None)),
        ("tight", 2 * (int(one / SHARE) + 2), ("full", 1)),
    ):
        tree = tree_of(name, {"recompute": "auto"})
        assert pool.run(2, train_with_room, tree=tree, free=free) == [Outcome()] * 2
        train = yaml.safe_load((tmp_path / name / "config.yaml").read_text(encoding="utf-8"))["train"]
        assert (train["recompute"], train.get("recompute_layers")) == chosen
    assert losses_of(tmp_path / "tight") == pytest.approx(losses_of(tmp_path / "roomy"), rel=1e-6)

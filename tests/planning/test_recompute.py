# SPDX-License-Identifier: Apache-2.0
"""`train.recompute = auto` recomputes as few layers as the memory needs, alike on all ranks, and says what it chose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from lora_megatron.config import Config, MethodSection, parse_config
from lora_megatron.errors import ConfigError
from lora_megatron.methods.choose import choose_method
from lora_megatron.methods.method import Method
from lora_megatron.model.checks import check_plan, layout_of
from lora_megatron.model.presets import resolve_shape
from lora_megatron.model.shape import ModelShape
from lora_megatron.parallel import free_memory
from lora_megatron.planning.gpus import find_gpu
from lora_megatron.planning.plan import Plan, plan_training
from lora_megatron.planning.recompute import SHARE, describe, settle
from lora_megatron.planning.search import Problem, nearest_fit
from lora_megatron.planning.stages import chunks_of, microbatch_of
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


LORA = choose_method(MethodSection(), num_layers=LAYERS)
FULL = choose_method(MethodSection(name="full"), num_layers=LAYERS)
FREED = {"none": 0, "selective": 1, "full": 2}  # by a layer


@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("needed", range(2 * LAYERS + 1))
def test_the_fewest_that_fit(needed: int, method: Method) -> None:
    """Frozen MLPs alone where all of them are enough, which are cheaper for what they free; else whole layers."""
    config, shape = config_of(recompute="auto")
    asked = []

    def fits(tried: Config) -> bool:
        asked.append(tried)
        return (tried.train.recompute_layers or 0) * FREED[tried.train.recompute] >= needed

    settled = settle(config, shape, method, fits).train
    expected = ("none", ("core_attn",), None) if needed == 0 else ("full", ("core_attn",), -(-needed // 2))
    if method is LORA and 0 < needed <= LAYERS:
        expected = ("selective", ("mlp",), needed)
    assert (settled.recompute, settled.recompute_modules, settled.recompute_layers) == expected
    assert len(asked) <= 5


def test_all_layers_where_nothing_fits_and_nothing_else_is_touched() -> None:
    config, shape = config_of(recompute="auto")
    assert describe(settle(config, shape, LORA, lambda tried: False)) == f"full, {LAYERS} a chunk"
    assert describe(settle(config, shape, LORA, lambda tried: tried.train.recompute_layers is not None)) == (
        "selective of mlp, 1 a chunk"
    )
    other, _ = config_of(recompute="selective")
    assert settle(other, shape, LORA, lambda tried: False) is other


def test_what_is_recomputed_in_words() -> None:
    both, _ = config_of(recompute="selective", recompute_modules=["core_attn", "mlp"])
    assert describe(both) == "selective of core_attn and mlp"
    assert describe(config_of(recompute="selective")[0]) == "selective"


MLPS = {"recompute": "selective", "recompute_modules": ["mlp"]}
WHOLE = {"recompute": "full"}


@pytest.mark.parametrize("kind", [MLPS, WHOLE], ids=["mlps", "whole layers"])
def test_a_plan_fills_the_memory_it_is_given(kind: dict[str, Any]) -> None:
    """One layer fewer recomputed would not fit, by the plan of a configuration that says so."""
    none = plan_of(0, recompute="none").chosen.largest.memory.total
    most, least = (none, MLPS) if kind is MLPS else (plan_of(0, **MLPS).chosen.largest.memory.total, WHOLE)
    memory = (most + plan_of(0, **least).chosen.largest.memory.total) / 2 / SHARE
    plan = plan_of(memory, recompute="auto")
    layers = plan.config.train.recompute_layers
    assert layers is not None
    assert 0 < layers < LAYERS
    assert plan.chosen.largest.memory.total <= SHARE * memory
    fewer = plan_of(0, **kind, recompute_layers=layers - 1)
    assert fewer.chosen.largest.memory.total > SHARE * memory
    same = plan_of(0, **kind, recompute_layers=layers)
    assert same.chosen == plan.chosen
    assert plan_of(2 * none, recompute="auto").config.train.recompute == "none"
    flops = [plan.chosen.flops.hardware for plan in (plan_of(0, recompute="none"), same, plan_of(0, **kind))]
    assert flops == sorted(flops)
    assert len(set(flops)) == 3


def test_full_fine_tuning_beside_it_recomputes_whole_layers() -> None:
    """Its MLPs train: what is said of frozen ones is left out, and `auto` does not try them."""
    assert describe(plan_of(0, **MLPS, recompute_layers=2).full_config) == "none"
    both = plan_of(0, recompute="selective", recompute_modules=["core_attn", "mlp"])
    assert describe(both.full_config) == "selective"
    all_layers = plan_of(0, recompute="full").full.largest.memory.total
    plan = plan_of((all_layers + plan_of(0, recompute="none").full.largest.memory.total) / 2 / SHARE, recompute="auto")
    assert plan.full_config.train.recompute == "full"
    assert plan.chosen.largest.memory.total < plan.full.largest.memory.total


def test_what_is_made_again_takes_room_while_nothing_behind_it_has_gone() -> None:
    """With all layers' MLPs rebuilt the last one's is made again beside all that is kept; with one fewer it is kept."""
    config, shape = config_of(**MLPS)
    batch = microbatch_of(config, shape)
    (every,) = chunks_of(shape, LORA, batch, 0)
    (but_one,) = chunks_of(shape, LORA, replace(batch, recompute_layers=LAYERS - 1), 0)
    assert every.made_again == 4 * shape.ffn_hidden_size * batch.tokens == but_one.held - every.held
    assert but_one.made_again == 0.0


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
        (
            {"recompute": "selective", "recompute_layers": 2},
            {},
            ("recompute_layers = 2", "not selective of [core_attn]"),
        ),
        ({**MLPS, "recompute_layers": 9}, {}, ("recompute_layers = 9", "has 8 layers")),
        (
            {"recompute": "full", "recompute_modules": ["mlp"]},
            {},
            ("recompute_modules = [mlp]", "not full", "selective"),
        ),
        ({"recompute_modules": ["core_attn", "mlp"]}, {}, ("recompute_modules = [core_attn, mlp]", "not none")),
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


@pytest.mark.parametrize("name", ["full", "bitfit", "ft_top2"])
def test_mlps_that_train_cannot_be_rebuilt_as_frozen(name: str) -> None:
    config, shape = config_of(**MLPS)
    config = config.model_copy(update={"method": MethodSection(name=name)})
    shape = replace(shape, num_layers=2)
    with pytest.raises(
        ConfigError, match=rf"^train\.recompute_modules = \[mlp\]: .* method\.name = {name} trains .*full$"
    ):
        check_plan(config, shape, choose_method(config.method, num_layers=2), 1)


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

    whole, mlp = allocated({"recompute": "full"}), allocated({**MLPS, "recompute_layers": 1})
    assert whole < allocated(MLPS) <= mlp < allocated({"recompute": "none"})
    for name, free, chosen in (
        ("roomy", 2**40, ("none", None)),
        ("tight", 2 * (int(mlp / SHARE) + 2), ("selective", 1)),
        ("tightest", 2 * (int(whole / SHARE) + 2), ("full", 2)),
    ):
        tree = tree_of(name, {"recompute": "auto"})
        assert pool.run(2, train_with_room, tree=tree, free=free) == [Outcome()] * 2
        train = yaml.safe_load((tmp_path / name / "config.yaml").read_text(encoding="utf-8"))["train"]
        assert (train["recompute"], train.get("recompute_layers")) == chosen
    assert losses_of(tmp_path / "tight") == losses_of(tmp_path / "roomy")
    assert losses_of(tmp_path / "tightest") == pytest.approx(losses_of(tmp_path / "roomy"), rel=1e-6)

# SPDX-License-Identifier: Apache-2.0
"""The configuration: what is accepted, and that every refusal is one line with the value and a way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_megatron.config import Config, load_config, parse_config
from lora_megatron.errors import ConfigError
from lora_megatron.methods.choose import choose_method

CONTRACT = {
    "model": "preset num_layers hidden_size num_attention_heads num_query_groups ffn_hidden_size "
    "max_position_embeddings vocab_size",
    "base": "weights seed",
    "method": "name targets alpha dropout",
    "parallel": "tensor pipeline virtual_pipeline context sequence",
    "optimizer": "lr weight_decay betas clip_grad sharding",
    "data": "train validation sequence_length micro_batch_size global_batch_size tokenizer",
    "train": "steps warmup_steps seed eval_every save_every precision recompute",
    "run": "dir resume",
}


def refusal(tree: Any) -> str:
    """The one line that a tree of sections is refused with."""
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("section", CONTRACT)
def test_every_documented_key_exists(section: str) -> None:
    keys = CONTRACT[section].split()
    known = Config.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
    assert len(keys) >= 2
    assert set(keys) <= set(known)


def test_defaults_that_the_contract_names() -> None:
    config = parse_config({})
    assert config.run.resume == "never"
    assert config.data.tokenizer is None  # the base decides: bytes for all but Hugging Face checkpoints
    assert config.optimizer.sharding == "none"
    assert (config.method.name, config.method.targets) == ("lora", {"q": 4, "v": 4})


@pytest.mark.parametrize(
    ("tree", "name", "nearest"),
    [
        ({"modle": {}}, "modle", "model"),
        ({"model": {"num_layer": 2}}, "model.num_layer", "model.num_layers"),
        ({"method": {"rank": 4}}, "method.rank", "method."),
        ({"parallel": {"tensors": 2}}, "parallel.tensors", "parallel.tensor"),
        ({"optimizer": {"learning_rate": 1}}, "optimizer.learning_rate", "optimizer."),
        ({"data": {"validaton": "x"}}, "data.validaton", "data.validation"),
        ({"run": {"resum": "auto"}}, "run.resum", "run.resume"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(tree: dict[str, Any], name: str, nearest: str) -> None:
    message = refusal(tree)
    assert message.startswith(f"unknown key {name}: did you mean {nearest}")
    assert "(valid: " in message


def test_a_key_below_a_value_is_refused(tmp_path: Path) -> None:
    message = refusal({"train": {"steps": {"count": 3}}})
    assert message.startswith("train.steps = {'count': 3} is not valid")
    path = written(tmp_path, "train:\n  steps: 3\n")
    with pytest.raises(ConfigError, match=r"'train\.steps\.count=4': steps is not a section"):
        load_config(path, ["train.steps.count=4"])


def test_an_unknown_target_names_the_valid_ones() -> None:
    message = refusal({"method": {"targets": {"w": 4}}})
    assert "method.targets.w" in message
    assert all(f"'{target}'" in message for target in ("q", "k", "v", "o", "fc1", "fc2"))
    assert "method.layers.0-1.door" in refusal({"method": {"layers": {"0-1": {"door": 4}}}})


@pytest.mark.parametrize(
    ("section", "key", "value", "reason"),
    [
        ("train", "steps", "many", "integer"),
        ("train", "steps", 1.5, "integer"),
        ("train", "steps", -1, "greater than or equal to 0"),
        ("train", "steps", True, "switches"),
        ("train", "epochs", 0, "greater than 0"),
        ("train", "epochs", -1, "greater than 0"),
        ("train", "epochs", float("nan"), "finite"),
        ("train", "epochs", True, "switches"),
        ("train", "epochs", "five", "number"),
        ("train", "eval_every", "epochs", "a number of steps from 0 to 1,000,000,000, or epoch"),
        ("train", "eval_every", -1, "or epoch"),
        ("train", "eval_every", 1.5, "or epoch"),
        ("train", "eval_every", True, "or epoch"),
        ("train", "best", False, "switches"),
        ("train", "label_smoothing", 1, "less than 1"),
        ("train", "label_smoothing", -0.1, "greater than or equal to 0"),
        ("train", "seed", 2.5, "integer"),
        ("optimizer", "lr", "fast", "number"),
        ("optimizer", "lr", float("nan"), "finite"),
        ("optimizer", "lr", float("inf"), "finite"),
        ("optimizer", "betas", [0.9], "field required"),
        ("optimizer", "betas", [0.9, 1.0], "less than 1"),
        ("optimizer", "betas", [0.9, True], "switches"),
        ("optimizer", "sharding", "zero", "'none', 'megatron' or 'deepspeed'"),
        ("method", "dropout", 1.0, "less than 1"),
        ("method", "alpha", 0, "greater than 0"),
        ("method", "targets", ["q", "v"], "dictionary"),
        ("method", "targets", {"q": True}, "switches"),
        ("method", "targets", {"q": "four"}, "integer"),
        ("parallel", "tensor", 0, "greater than or equal to 1"),
        ("parallel", "tensor", "2x", "integer"),
        ("parallel", "sequence", "maybe", "boolean"),
        ("data", "sequence_length", 1, "greater than or equal to 2"),
        ("data", "train", 7, "string"),
        ("train", "precision", "fp16", "'fp32' or 'bf16'"),
        ("train", "attention", "fa3", "'torch' or 'fa4'"),
        ("train", "recompute", True, "switches"),
        ("train", "recompute_modules", ["fc1"], "'core_attn' or 'mlp'"),
        ("train", "recompute_modules", [], "at least 1 item"),
        ("train", "recompute_modules", "mlp", "tuple"),
        ("run", "resume", False, "switches"),
        ("run", "dir", ["a"], "string"),
        ("model", "num_attention_heads", 0, "greater than or equal to 1"),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(section: str, key: str, value: Any, reason: str) -> None:
    message = refusal({section: {key: value}})
    assert message.startswith(f"{section}.{key}")
    assert " is not valid: " in message
    assert reason in message


def test_a_section_that_is_a_value_is_told_its_keys() -> None:
    message = refusal({"parallel": 2})
    assert message.startswith("parallel = 2 is not a section: it needs tensor, pipeline")
    assert "instance of" not in message
    assert "is not a section" in refusal({"run": None})


def test_a_huge_value_does_not_fill_the_terminal() -> None:
    deep: Any = "x" * 10_000
    for _ in range(30):
        deep = [deep] * 30  # shared references, as YAML aliases make them: written out it would have 30**30 items
    assert "train.steps" in refusal({"train": {"steps": deep}})


def test_the_file_wins_over_defaults_and_overrides_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "train:\n  steps: 3\n  seed: 9\noptimizer:\n  lr: 1e-4\n")
    config = load_config(
        path, ["train.steps=5", "method.targets={q: 8, fc1: 2}", "run.dir=a=b", "parallel.sequence=on"]
    )
    assert (config.train.steps, config.train.seed, config.train.warmup_steps) == (5, 9, 0)
    assert config.optimizer.lr == 1e-4
    assert config.method.targets == {"q": 8, "fc1": 2}
    assert config.run.dir == "a=b"
    assert config.parallel.sequence is True


def test_a_run_is_so_many_steps_or_so_many_epochs_long(tmp_path: Path) -> None:
    for tree, steps, epochs in (({}, 100, None), ({"steps": 7}, 7, None), ({"epochs": 2.5}, None, 2.5)):
        config = parse_config({"train": tree})
        assert (config.train.steps, config.train.epochs) == (steps, epochs)
        assert load_config(written(tmp_path, config.to_yaml())) == config, "the resolved one is read as it was"
    message = refusal({"train": {"steps": 3, "epochs": 2}})
    assert message.startswith("train.epochs = 2 is not valid: train.steps = 3 is given too")
    assert "train.steps=null" in message
    path = written(tmp_path, "train: {steps: 3}")
    assert load_config(path, ["train.steps=null", "train.epochs=2"]).train.steps is None
    assert load_config(path, ["train.steps=null"]).train.steps == 100


def test_an_override_can_start_a_section_and_reach_into_a_map(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, ""), ["method.targets.k=3", "data.train=x.parquet", "optimizer.lr=3e-5"])
    assert config.method.targets == {"k": 3}
    assert (config.data.train, config.optimizer.lr) == ("x.parquet", 3e-5)


@pytest.mark.parametrize("override", ["train.steps", "steps=5", "=5", ".steps=5", "train.=5", "", "train..steps=5"])
def test_an_override_of_another_form_is_refused_with_an_example(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"is not of the form section\.key=value, e\.g\. train\.steps=100"):
        load_config(written(tmp_path, ""), [override])


@pytest.mark.parametrize("value", ["[1, 2", "{q: 8", "a: b: c", "2024-99-99", "!!python/object/apply:os.getcwd []"])
def test_an_override_whose_value_is_not_yaml_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match="the value is not valid YAML"):
        load_config(written(tmp_path, ""), [f"train.steps={value}"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("train: [", "not valid YAML"),
        ("train:\n\tsteps: 3\n", "not valid YAML"),
        ("train:\n  steps: 3\n  steps: 4\n", "'steps' stands there twice"),
        ("train: {}\ntrain: {}\n", "'train' stands there twice"),
        ("- train\n- model\n", "must hold sections .* not a list"),
        ("just words\n", "must hold sections .* not a str"),
        ("day: 2024-99-99\n", "not valid YAML"),
        ("[" * 3000, "not valid YAML"),
        (b"\xff\xfe\x00", "cannot read configuration"),
        ("run:\n  dir: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_not_a_configuration_is_refused(tmp_path: Path, text: str | bytes, reason: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=reason) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read configuration .*none\.yaml: No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"cannot read configuration .*: Is a directory"):
        load_config(tmp_path)


def test_keys_that_are_not_words_are_refused() -> None:
    assert "not valid" in refusal({3: {}})
    assert "method.layers" in refusal({"method": {"layers": {0: {"q": 2}}}})


def test_the_resolved_configuration_loads_back_to_itself(tmp_path: Path) -> None:
    config = parse_config(
        {
            "model": {"preset": "tiny-llama", "norm_epsilon": 1e-6},
            "method": {
                "targets": {"k": 1, "fc2": 7},
                "layers": {"0": {"k": 2}, "1-2,5": {"o": 3}},
                "scaling": "rslora",
            },
            "optimizer": {"lr": 1e-7, "betas": [0.5, 0.25], "sharding": "megatron"},
            "parallel": {"tensor": 2, "sequence": True, "timeout_minutes": 0.5},
            "data": {"train": "no", "validation": "1e3", "tokenizer": "ünïcode: #"},
            "run": {"dir": "null", "resume": "runs/a/checkpoints/step-00000002"},
        }
    )
    path = written(tmp_path, config.to_yaml())
    assert load_config(path) == config
    assert load_config(written(tmp_path, parse_config({}).to_yaml())) == parse_config({})


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        (
            {"name": "lorra"},
            r"unknown method\.name 'lorra': did you mean lora\? \(valid: lora, full, bitfit, ft_top2\)",
        ),
        ({"targets": {"q": 0}}, r"method\.targets\.q = 0: a rank must be at least 1"),
        ({"targets": {"fc1": -3}}, r"method\.targets\.fc1 = -3: a rank must be at least 1"),
        ({"layers": {"0": {"q": -1}}}, r"method\.layers\[0\]\.q = -1: a rank must be at least 1"),
        ({"targets": {}}, r"method\.targets is empty: name at least one of q, k, v, o, fc1, fc2"),
        ({"layers": {"0-4": {"q": 1}}}, r"pattern '0-4': layers run from 0 to 3"),
        ({"layers": {"2-1": {"q": 1}}}, r"pattern '2-1': layers run from 0 to 3"),
        ({"layers": {"first": {"q": 1}}}, r"pattern 'first': write layer indices and ranges, e\.g\. 0-11,23"),
    ],
)
def test_a_method_that_cannot_be_is_refused(section: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        choose_method(parse_config({"method": section}).method, num_layers=4)

# SPDX-License-Identifier: Apache-2.0
"""Values far beyond any model or run, and worlds that cannot be joined: one line at once, no traceback, no loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_megatron.config import LARGEST_SEED
from lora_megatron.errors import ConfigError
from lora_megatron.model import checks
from lora_megatron.parallel import groups
from lora_megatron.quickstart import run_quickstart
from tests.commands.runs import Outcome, Tree, attempt, make_tree

ZERO = {"q": 0, "v": 0, "fc2": 0}


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("optimizer", "lr", 1e38, "less than or equal to"),
        ("optimizer", "eps", 1e300, "less than or equal to"),
        ("train", "seed", 2**64 - 1, str(LARGEST_SEED)),
        ("train", "steps", 10**20, "less than or equal to"),
        ("parallel", "timeout_minutes", 1e300, "less than or equal to"),
        ("parallel", "tensor", 10**20, "less than or equal to"),
        ("model", "vocab_size", 10**13, "less than or equal to 2147483648"),
        ("model", "hidden_size", 10**13, "less than or equal to"),
        ("model", "num_layers", 10**11, "less than or equal to 1000000"),
        ("data", "global_batch_size", 10**20, "less than or equal to"),
        ("data", "micro_batch_size", 10**20, "less than or equal to"),
        ("data", "sequence_length", 10**20, "less than or equal to"),
    ],
)
def test_a_number_far_beyond_any_run(
    corpus: Path, tmp_path: Path, section: str, key: str, value: float, words: str
) -> None:
    outcome = attempt(make_tree(corpus, tmp_path / "run", **{section: {key: value}}))
    assert outcome.status == 2
    assert outcome.message.startswith(f"{section}.{key} = ")
    assert words in outcome.message
    assert "\n" not in outcome.message


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"method": {"layers": {"0-1": ZERO, "2,3": ZERO}}}, "is overruled by rank 0 for every layer"),
        ({"method": {"targets": {}}}, "method.targets is empty"),
        (
            {"model": {"vocab_size": 2**31}},
            "weights of this model need 256 GiB on each rank, and a device has 24 GiB",
        ),
        ({"model": {"num_layers": 10**6}}, "the weights of this model need"),
        ({"data": {"micro_batch_size": 10**9, "global_batch_size": 10**9}}, "micro_batch_size x sequence_length need"),
    ],
)
def test_what_cannot_train_or_fit(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Tree], words: str
) -> None:
    monkeypatch.setattr(checks, "device_memory_bytes", lambda: 24 * 2**30)
    outcome = attempt(make_tree(corpus, tmp_path / "run", **sections))
    assert outcome.status == 2
    assert words in outcome.message
    assert not (tmp_path / "run").exists()


def test_the_largest_seed_trains_and_a_rank_0_in_every_layer_but_one_too(corpus: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"train": {"seed": LARGEST_SEED, "steps": 1}, "method": {"layers": {"0-2": ZERO}}}
    assert attempt(make_tree(corpus, tmp_path / "run", **sections)) == Outcome()


@pytest.mark.parametrize("seed", [-1, LARGEST_SEED + 1, 99999999999999999999])
def test_a_seed_of_the_quickstart_that_no_generator_takes(tmp_path: Path, seed: int) -> None:
    with pytest.raises(ConfigError, match=f"--seed {seed} must be between 0 and"):
        run_quickstart(tmp_path / "out", seed=seed)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "1"}, "RANK is set and MASTER_ADDR is not: start with torchrun"),
        ({"RANK": "0"}, "RANK is set and WORLD_SIZE is not"),
        ({"RANK": "x", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "cannot join .*RANK=x"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
    ],
)
def test_a_world_that_is_announced_by_half(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words) as error:
        groups.join_world()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("local", "words"),
    [
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}, "4 processes on a machine with 2 GPUs: start at most 2"),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}, 'CUDA_VISIBLE_DEVICES="" to use the CPU'),  # the one that speaks
        ({"LOCAL_RANK": "2"}, "3 processes on a machine with 2 GPUs"),
        ({"LOCAL_RANK": "x"}, "must be numbers"),
    ],
)
def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch, local: dict[str, str], words: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for name, value in local.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        groups.join_world()

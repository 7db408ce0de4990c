# SPDX-License-Identifier: Apache-2.0
"""A plan touches no device, also where there is one: megatron-core would move tied embeddings to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_megatron.config import parse_config
from lora_megatron.methods.choose import choose_method
from lora_megatron.model.presets import resolve_shape
from lora_megatron.planning.plan import plan_training


def test_tied_embeddings_under_pipeline_parallelism_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on two H100: `Tensor.cuda` of a tensor without storage raised there; on a CPU it is redirected."""

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")

    monkeypatch.setattr(torch.Tensor, "cuda", cuda)
    model = {"preset": "tiny", "vocab_size": 100, "tied_embeddings": True}
    config = parse_config({"model": model, "parallel": {"pipeline": 2}, "data": {"sequence_length": 64}})
    shape = resolve_shape(config.model, tokenizer_vocab_size=100)
    plan = plan_training(config, shape, choose_method(config.method, num_layers=shape.num_layers), world_size=2)
    assert [rank.stage for rank in plan.chosen.ranks] == [0, 1]

# SPDX-License-Identifier: Apache-2.0
"""Rotary frequencies against transformers' own functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_megatron.errors import ConfigError
from lora_megatron.layers.rope import attention_factor, inverse_frequencies

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize("dim", [8, 128])
@pytest.mark.parametrize("base", [1e4, 5e5])
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.5},
        {"rope_type": "dynamic", "factor": 2.0},
        LLAMA3,
        {**LLAMA3, "original_max_position_embeddings": 64, "factor": 32},
        YARN,
        {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
        {**YARN, "attention_factor": 1.25},
    ],
    ids=["linear", "dynamic", "llama3", "llama3-short", "yarn", "yarn-betas", "yarn-mscale", "yarn-factor"],
)
def test_frequencies_equal_transformers(dim: int, base: float, scaling: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_theta": base, **scaling}
    config = LlamaConfig(hidden_size=dim * 2, num_attention_heads=2, rope_parameters=parameters)
    theirs, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    ours = inverse_frequencies(dim, base=base, scaling=scaling)
    torch.testing.assert_close(ours, theirs, rtol=3e-6, atol=0)
    assert attention_factor(scaling) == pytest.approx(factor, rel=1e-12)
    plain = inverse_frequencies(dim, base=base, scaling={})
    assert torch.equal(ours, plain) == (scaling["rope_type"] == "dynamic"), "scaling must act"


@pytest.mark.parametrize(
    ("scaling", "says"),
    [
        ({"rope_type": "longrope"}, "'longrope' is not supported"),
        ({"rope_type": "linear"}, "needs factor > 0, not None"),
        ({"rope_type": "linear", "factor": 0}, "needs factor > 0, not 0"),
        ({"rope_type": "yarn", "factor": "4", "original_max_position_embeddings": 64}, "not '4'"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor > low_freq_factor"),
    ],
)
def test_impossible_scaling_is_refused(scaling: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        inverse_frequencies(8, base=1e4, scaling=scaling)

# SPDX-License-Identifier: Apache-2.0
"""What `launch/adapter_tax.py` builds: slices of GPT-3 with adapters and without, by its options."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from launch import side_by_side as side
from lora_megatron.config import Config, parse_config
from lora_megatron.model.presets import resolve_shape
from lora_megatron.model.shape import ModelShape

STORAGES: dict[str, dict[str, str]] = {
    "bf16": {"storage": "bf16"},
    "fp8": {"storage": "fp8"},
    "nf4": {"storage": "nf4"},
    "nf4-fp8": {"storage": "nf4", "gemm": "fp8"},
}
TARGETS = ("q", "k", "v", "o", "fc1", "fc2")
REFERENCE_LAYERS = {"0": {"q": 1}}


@dataclass(frozen=True)
class Case:
    storage: str
    layers: int
    adapted: bool

    def __str__(self) -> str:
        return f"{self.storage}, {side.layers_text(self.layers)}, {'LoRA' if self.adapted else 'reference'}"


@dataclass(frozen=True)
class Pair:
    """What is compared."""

    storage: str
    layers: int

    @property
    def cases(self) -> tuple[Case, Case]:
        """Adapted first: what goes beside its tokens takes more room in boxes, which both use."""
        return Case(self.storage, self.layers, True), Case(self.storage, self.layers, False)

    def __str__(self) -> str:
        return f"{self.storage}, {side.layers_text(self.layers)}"


def config_of(case: Case, options: argparse.Namespace) -> Config:
    """The configuration of a case; raises ConfigError."""
    targets = side.names_of(options.targets, TARGETS, flag="--targets")
    method = {"targets": dict.fromkeys(targets, options.rank)} if case.adapted else {"layers": REFERENCE_LAYERS}
    return parse_config(
        {
            "model": side.model_section(options, layers=case.layers),
            "base": STORAGES[case.storage],
            "method": {"targets": {}, **method},
            "parallel": {
                "tensor": options.tensor,
                "sequence": options.sequence_parallel,
                "tp_comm_overlap": options.sequence_parallel,
            },
            "optimizer": {"lr": 1e-4, "clip_grad": 1.0},
            "data": {
                "sequence_length": options.sequence,
                "micro_batch_size": options.batch,
                "global_batch_size": options.batch * options.microbatches,
            },
            "train": {
                "precision": "bf16",
                "recompute": "none",
                "cuda_graph": options.cuda_graph,
                "attention": options.attention,
            },
        }
    )


def shape_of(config: Config) -> ModelShape:
    return resolve_shape(config.model, tokenizer_vocab_size=config.model.vocab_size or 0)

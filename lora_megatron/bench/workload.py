# SPDX-License-Identifier: Apache-2.0
"""What is measured: the trainer that `lora-megatron train` would run, on random tokens and, mostly, random weights.

Shapes decide the speed of a step and nothing here changes one. Values do not matter but for one thing: a processor that
is limited by its power runs faster on zeros, so tokens and weights are drawn, never constant.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import torch
from megatron.core import parallel_state as mpu
from torch import nn

from lora_megatron.config import Config
from lora_megatron.data.batches import BatchSource, Microbatch
from lora_megatron.layers.lora import seed_from
from lora_megatron.layers.storage.stored import writable
from lora_megatron.measure.memory import ActivationMeter
from lora_megatron.methods.choose import choose_method
from lora_megatron.methods.method import Method
from lora_megatron.model.build import build
from lora_megatron.model.checks import layout_of, options_of
from lora_megatron.model.names import named_parameters
from lora_megatron.model.recomputation import without_mlp
from lora_megatron.model.shape import ModelShape
from lora_megatron.training.choose_optimizer import choose_optimizer
from lora_megatron.training.cuda_graph import StepGraph
from lora_megatron.training.loop import Trainer
from lora_megatron.training.optimizer import wrap_ddp

Load = Callable[[Sequence[nn.Module]], None]
_STANDARD_DEVIATION = 0.02  # GPT-2's


class RandomTokens:
    """Microbatches of the configuration's shape; sample i is a function of (seed, i), as in a data set."""

    def __init__(self, config: Config, *, vocab_size: int) -> None:
        self.micro_batch_size = config.data.micro_batch_size
        self.sequence_length = config.data.sequence_length
        self.packing = config.data.packing
        self._vocab_size, self._seed = vocab_size, config.train.seed

    def microbatch(self, first_sample: int) -> Microbatch:
        """As `BatchSource.microbatch`: every position counts in the loss; with packing each row holds two examples."""
        b, s = self.micro_batch_size, self.sequence_length
        generator = torch.Generator().manual_seed(seed_from(self._seed, "bench", first_sample))
        ids = torch.randint(0, self._vocab_size, (b, s + 1), generator=generator)
        return {
            "tokens": ids[:, :-1].contiguous(),
            "labels": ids[:, 1:].contiguous(),
            "loss_mask": torch.ones(b, s),
            "position_ids": torch.arange(s).expand(b, s).contiguous(),
            "attention_mask": self._two_examples() if self.packing else None,
            "first_sample": first_sample,
        }

    def _two_examples(self) -> torch.Tensor:
        """bool [b, 1, s, s], True where a position must not be seen."""
        s = self.sequence_length
        half = torch.arange(s) >= s // 2
        hidden = (half[:, None] != half[None, :]) | torch.ones(s, s, dtype=torch.bool).triu(diagonal=1)
        return hidden.expand(self.micro_batch_size, 1, s, s)


def bench_config(config: Config, method: str) -> Config:
    """The same run with `method`, at a constant learning rate from the first step.

    Full fine-tuning has no frozen weights to keep in another format: it runs in `train.precision`. Nor can it rebuild
    frozen MLPs.
    """
    base = config.base
    if method == "full":
        config, base = without_mlp(config), base.of_training_precision()
    return config.model_copy(
        update={
            "base": base,
            "method": config.method.model_copy(update={"name": method, "start_from": None}),
            "train": config.train.model_copy(
                update={"steps": 0, "epochs": None, "warmup_steps": 0, "schedule": "constant", "spike_factor": 0.0}
            ),
        }
    )


def multiplies_in_fp8(config: Config) -> bool:
    """Whether frozen linear layers or the output layer do."""
    return "fp8" in (config.base.storage, config.base.gemm, config.base.head)


def slice_of(shape: ModelShape, layers: int) -> ModelShape:
    """The same model with its first `layers` layers: embedding, every kind of layer work and head stay."""
    return replace(shape, num_layers=layers, full_attention_layers=min(shape.full_attention_layers, layers))


def method_of(config: Config, shape: ModelShape) -> Method:
    """The method of a `bench_config` on this shape; raises ConfigError."""
    return choose_method(config.method, num_layers=shape.num_layers)


def build_trainer(config: Config, shape: ModelShape, *, load: Load | None) -> Trainer:
    """A trainer at step 0 on this rank, made as `train` makes it; `load` None draws random weights.

    Raises:
        CheckpointError: the stored base is damaged.
    """
    method = method_of(config, shape)
    chunks = build(shape, method, layout_of(config), options_of(config))
    draw_weights(chunks, seed=config.base.seed) if load is None else load(chunks)
    graph = StepGraph() if config.train.cuda_graph else None
    ddp = wrap_ddp(chunks, sharding=config.optimizer.sharding, precision=config.train.precision, graph=graph)
    return Trainer(
        config=config,
        chunks=ddp,
        optimizer=choose_optimizer(ddp, config.optimizer, precision=config.train.precision, graph=graph),
        data=cast(BatchSource, RandomTokens(config, vocab_size=shape.vocab_size)),  # all that a step asks of it
        held_out=None,
        meter=ActivationMeter(chunks),
        graph=graph,
    )


@torch.no_grad()
def draw_weights(chunks: Sequence[nn.Module], *, seed: int) -> None:
    """Fill the base parameters in place with normal(0, 0.02), norms with one, biases with zero.

    Unlike `initialise_base` each rank draws its own shard only, with no second tensor beside it: a slice that just fits
    can be drawn. The result depends on the layout, which no speed does; what is replicated is equal on all ranks.
    """
    for named in named_parameters(chunks):
        if ".adapters." in named.name:
            continue
        with writable(named.parameter) as target:
            if named.name.endswith(".bias"):
                target.zero_()
            elif target.dim() == 1:
                target.fill_(1.0)
            else:
                generator = torch.Generator(target.device).manual_seed(seed_from(seed, named.name))
                target.normal_(0.0, _STANDARD_DEVIATION, generator=generator)


def free() -> None:
    """Give back what a trainer that nobody holds any more has used; the process groups stay."""
    gc.collect()  # a model and its schedule refer to each other
    buffer = getattr(mpu.get_global_memory_buffer(), "buffer", None)  # gathered sequence shards, kept between steps
    if buffer is not None:
        buffer.clear()
    torch.cuda.empty_cache()


def tokens_per_step(config: Config) -> int:
    """Positions of a global batch."""
    return config.data.global_batch_size * config.data.sequence_length

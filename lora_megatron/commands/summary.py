# SPDX-License-Identifier: Apache-2.0
"""What a run comes to: the numbers of its report."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from lora_megatron.checkpoint.base import Base
from lora_megatron.config import Config
from lora_megatron.data.examples import prompt_ids
from lora_megatron.data.parquet import ExampleTable
from lora_megatron.data.tokenizer import Tokenizer
from lora_megatron.evaluation.greedy import greedy
from lora_megatron.layers.sharding import shard_of
from lora_megatron.measure.facts import steady_spread
from lora_megatron.measure.memory import gather_memory
from lora_megatron.measure.metrics import EVALUATIONS_NAME, METRICS_NAME, read_metrics
from lora_megatron.methods.method import Method
from lora_megatron.model.names import named_parameters
from lora_megatron.parallel.agree import gather_text
from lora_megatron.parallel.groups import Ranks
from lora_megatron.training.loop import StepReport, Trainer
from lora_megatron.training.optimizer import gradient_bytes

_NEW_TOKENS = 256  # each costs a forward pass over the whole length


@dataclass
class Run:
    """A training run as the command sees it."""

    config: Config
    base: Base
    method: Method
    trainer: Trainer
    tokenizer: Tokenizer
    held_out_table: ExampleTable | None
    ranks: Ranks
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    reports: list[StepReport] = field(default_factory=list)

    @property
    def bare_chunks(self) -> list[GPTModel]:
        """The GPTModels inside DDP."""
        return [chunk.module for chunk in self.trainer.chunks]

    def sample_rows(self) -> list[int]:
        """Held-out rows to continue, spread over the file."""
        count = min(self.config.train.samples, len(self.held_out_table or ()))
        return [row * len(self.held_out_table or ()) // count for row in range(count)]


def continuations(run: Run) -> list[str]:
    """The model's greedy continuation of some held-out contexts; collective."""
    rows = run.sample_rows()
    if not rows or run.held_out_table is None:
        return []
    tokenizer, length = run.tokenizer, run.config.data.sequence_length
    tensor = run.config.parallel.tensor
    prompts = [prompt_ids(run.held_out_table[row][1], tokenizer, rendered=run.held_out_table.rendered) for row in rows]
    answers = greedy(
        run.trainer.chunks,
        prompts,
        length=length - length % tensor,
        new_tokens=_NEW_TOKENS,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        vocab_size=tokenizer.vocab_size,
    )
    return [tokenizer.decode(answer) for answer in answers]


def summarise(run: Run, *, wall_seconds: float) -> dict[str, Any]:
    """The report's numbers, on every rank; collective."""
    config, trainer, ranks = run.config, run.trainer, run.ranks
    memory = gather_memory(
        trainer.meter.memory(gradients=gradient_bytes(trainer.chunks), optimizer=trainer.optimizer.state_bytes())
    )
    trainable, total = _count_parameters(run)
    spread = steady_spread([report.step_seconds for report in run.reports])
    tokens = config.data.global_batch_size * config.data.sequence_length
    rate = tokens / spread["median"] if spread else None
    train_curve, held_out_curve = _curves(Path(config.run.dir))
    return {
        "method": run.method.name,
        "layout": {**config.parallel.model_dump(exclude={"timeout_minutes"}), "data": ranks.data_size},
        "world_size": ranks.world_size,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "precision": config.train.precision,
        "steps": trainer.step,
        "held_out_loss": {
            "before": held_out_curve[0][1] if held_out_curve and held_out_curve[0][0] == 0 else None,
            "after": held_out_curve[-1][1] if held_out_curve else None,
        },
        "best": {"by": config.train.best, **asdict(trainer.best)} if trainer.best else None,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "checkpoint_bytes": _checkpoint_bytes(run),
        "tokens_per_second": rate,
        "tokens_per_second_per_rank": rate / ranks.world_size if rate else None,
        "step_seconds": spread,
        "peak_memory_bytes": max(m.peak for m in memory),
        "memory_by_rank": [{"rank": rank, **asdict(m)} for rank, m in enumerate(memory)],
        "train_curve": train_curve,
        "held_out_curve": held_out_curve,
        "samples": _samples(run),
        "wall_seconds": wall_seconds,
        "truncated_rows": trainer.data.truncated_rows,
    }


def _count_parameters(run: Run) -> tuple[int, int]:
    """(trained, all) parameters of the unsharded model; collective."""
    ranks = run.ranks
    trained, total = 0, 0
    if ranks.tensor == 0 and ranks.data == 0:
        for named in named_parameters(run.bare_chunks):
            if named.is_copy:
                continue
            parameter = named.parameter
            count = math.prod(shard_of(parameter).full_shape(parameter.shape, ranks.tensor_size))
            total += count
            trained += count if parameter.requires_grad else 0
    pairs = [json.loads(text) for text in gather_text(json.dumps([trained, total]))]
    return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)


def _checkpoint_bytes(run: Run) -> int:
    """Bytes of the tensors one has to keep for this task: the adapter, or the whole model."""
    folder = Path(run.config.run.dir) / ("model" if run.method.trains_base else "adapter")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _curves(folder: Path) -> tuple[list[list[float]], list[list[float]]]:
    """[step, loss] of training and of held-out data, from the logs (which also cover steps before a resume)."""
    return _curve(folder / METRICS_NAME, "loss"), _curve(folder / EVALUATIONS_NAME, "held_out_loss")


def _curve(path: Path, key: str) -> list[list[float]]:
    lines = read_metrics(path) if path.exists() else ()
    return [[line["step"], line[key]] for line in lines if line.get(key) is not None]


def _samples(run: Run) -> list[dict[str, str]]:
    table, samples = run.held_out_table, []
    if table is None:
        return []
    before = run.before or [""] * len(run.after)
    for row, first, last in zip(run.sample_rows(), before, run.after, strict=True):
        _, context, reference = table[row]
        samples.append({"context": context, "reference": reference, "before": first, "after": last})
    return samples

# SPDX-License-Identifier: Apache-2.0
"""LoRA here, under Hugging Face PEFT, and in ordinary torch layers: whole training steps of one shape, side by side.

    python launch/bench_peft.py --out runs/bench_peft
    python launch/bench_peft.py --layers 2,4 --scale-to 96 --batch 2 --cases bf16,fp8,nf4-fp8,peft --out runs/peft2

The shape is GPT-3's (width 12288, 96 heads) unless told otherwise, the weights random, the tokens random, everything in
bf16 but the frozen weights' storage. A step is forward, loss, backward, clipping of the gradient norm and AdamW.

    bf16, fp8, nf4       this project with base.storage of that name, LoRA on q and v
    nf4-fp8              NF4 weights whose products are in FP8 (base.gemm)
    plain                nn.Linear, nn.LayerNorm, gelu, LoRA beside q and v, cross-entropy on logits in fp32
    peft                 PEFT on transformers' GPT-2, LoRA on c_attn (q, k and v in one, the same number of parameters)
    peft-checkpointing   the same with its gradient checkpointing

--layers 2,4 measures two slices; --scale-to 96 then adds what the line through them says of a whole model. Sizes such
as --hidden 32 --heads 2 --layers 2 --sequence 16 --vocabulary 100 run on a CPU, where times say nothing.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch
import yaml

from launch import side_by_side as side
from launch.peft_report import lines_of, with_ratios
from launch.rival_models import RivalTrainer, Sizes, build_rival, count
from lora_megatron.bench.timing import TimedOptimizer, now, timed_step
from lora_megatron.bench.workload import RandomTokens, bench_config, build_trainer, free, method_of, tokens_per_step
from lora_megatron.config import Config, load_config
from lora_megatron.errors import ConfigError
from lora_megatron.measure.environment import describe_environment
from lora_megatron.measure.memory import ActivationMeter
from lora_megatron.model.checks import check, layout_of
from lora_megatron.model.presets import resolve_shape
from lora_megatron.model.shape import ModelShape
from lora_megatron.parallel import groups
from lora_megatron.training.optimizer import Optimizer

KIND = "bench_peft"
OURS = {"bf16": {"storage": "bf16"}, "fp8": {"storage": "fp8"}, "nf4": {"storage": "nf4"}}
OURS["nf4-fp8"] = {"storage": "nf4", "gemm": "fp8"}
RIVALS = ("plain", "peft", "peft-checkpointing")
LR, CLIP, ALPHA = 1e-4, 1.0, 16.0
_FEWEST_WARM_UP_ON_CPU = 3  # a CPU's activations are counted tensor by tensor in these


@dataclass(frozen=True)
class Case:
    name: str
    layers: int

    def __str__(self) -> str:
        return f"{self.name}, {side.layers_text(self.layers)}"


@dataclass
class Session:
    """A model under way: `step` takes one and returns the loss."""

    step: Callable[[bool], float]
    """Called with whether the step's memory is watched."""
    meter: ActivationMeter
    trained: int


@dataclass
class Visits:
    """What all visits to a case have measured."""

    seconds: list[list[float]] = field(default_factory=list)
    peak: int | None = None
    """Bytes; of a GPU's allocator only."""
    activations: int = 0
    """Peak minus what was allocated as the step began; on a CPU what autograd kept."""
    trained: int = 0
    losses: list[float] = field(default_factory=list)
    out_of_memory: bool = False


def config_of(case: Case, options: argparse.Namespace) -> Config:
    """Our configuration of a case, through the same door as a user's file; raises ConfigError."""
    tree = {
        "model": side.model_section(options, layers=case.layers),
        "base": OURS.get(case.name, {}),
        "method": {"targets": {"q": options.rank, "v": options.rank}, "alpha": ALPHA},
        "optimizer": {"lr": LR, "clip_grad": CLIP},
        "data": {
            "sequence_length": options.sequence,
            "micro_batch_size": options.batch,
            "global_batch_size": options.batch,
        },
        "train": {"precision": "bf16", "recompute": "none"},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return bench_config(load_config(path, options.override), "lora")


def shape_of(config: Config) -> ModelShape:
    return resolve_shape(config.model, tokenizer_vocab_size=config.model.vocab_size or 0)


def open_ours(case: Case, options: argparse.Namespace) -> Session:
    """Our trainer, as `lora-megatron train` makes it."""
    config = config_of(case, options)
    trainer = build_trainer(config, shape_of(config), load=None)
    trainer.optimizer = cast(Optimizer, TimedOptimizer(trainer.optimizer))
    trained = [parameter for chunk in trainer.chunks for parameter in chunk.parameters() if parameter.requires_grad]
    return Session(lambda _: timed_step(trainer)[1].loss, trainer.meter, count(trained))  # it watches by itself


def open_rival(case: Case, options: argparse.Namespace) -> Session:
    """The same batches for another model."""
    sizes = Sizes(
        layers=case.layers,
        hidden=options.hidden,
        heads=options.heads,
        sequence=options.sequence,
        vocabulary=options.vocabulary,
        rank=options.rank,
        alpha=ALPHA,
    )
    trainer = RivalTrainer(build_rival(case.name, sizes, activation=options.peft_gelu), lr=LR, clip=CLIP)
    tokens = RandomTokens(config_of(case, options), vocab_size=options.vocabulary)
    taken = iter(range(0, sys.maxsize, options.batch))

    def step(metered: bool) -> float:
        batch = tokens.microbatch(next(taken))
        return trainer.step(batch["tokens"], batch["labels"], metered=metered)

    return Session(step, trainer.meter, count(trainer.trained))


def visit(case: Case, options: argparse.Namespace, visits: Visits) -> None:
    """Build a case, warm up, take its steps, free it; what was measured goes into `visits`."""
    try:
        _measure((open_ours if case.name in OURS else open_rival)(case, options), options, visits)
    except torch.OutOfMemoryError:
        visits.out_of_memory = True
    free()  # not before the exception is gone: its traceback holds the model


def _measure(session: Session, options: argparse.Namespace, visits: Visits) -> None:
    on_gpu = torch.cuda.is_available()
    warm_up = options.warm_up if on_gpu else max(options.warm_up, _FEWEST_WARM_UP_ON_CPU)
    visits.trained = session.trained
    visits.seconds.append([])
    for index in range(warm_up + options.steps):
        before = torch.cuda.memory_allocated() if on_gpu else 0
        started = now()
        loss = session.step(on_gpu or index < warm_up)
        taken = now() - started
        visits.losses.append(loss)
        visits.activations = max(visits.activations, session.meter.last_bytes - before)
        if on_gpu:
            visits.peak = max(visits.peak or 0, session.meter.last_bytes)
        if index >= warm_up:
            visits.seconds[-1].append(taken)


def row_of(case: Case, visits: Visits, *, tokens: int) -> dict[str, Any]:
    """The numbers of a case, JSON values."""
    row: dict[str, Any] = {"case": case.name, "layers": case.layers, "out_of_memory": visits.out_of_memory}
    if visits.out_of_memory or not visits.seconds:
        return row
    seconds = side.pooled(visits.seconds)
    return {
        **row,
        "step_seconds": seconds,
        "seconds_of_steps": visits.seconds,
        "tokens_per_second": tokens / seconds["median"],
        "peak_bytes": visits.peak,
        "activation_bytes": visits.activations,
        "trained_parameters": visits.trained,
        "first_loss": visits.losses[0],
        "last_loss": visits.losses[-1],
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, what in (
        ("hidden", 12288, "width"),
        ("heads", 96, "attention heads"),
        ("sequence", 2048, "tokens in a row"),
        ("batch", 1, "rows in a step"),
        ("vocabulary", 50257, "tokens known"),
        ("rank", 4, "of LoRA"),
        ("steps", 8, "measured ones in a visit"),
        ("warm-up", 3, "steps before them; on a CPU at least 3"),
        ("rounds", 2, "visits to every case"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: {default})")
    parser.add_argument("--layers", default="4", help="of the model, or two numbers such as 2,4 (default: 4)")
    parser.add_argument("--scale-to", type=int, help="layers of a whole model to extrapolate to from two slices")
    parser.add_argument("--cases", default="bf16,fp8,plain,peft,peft-checkpointing", help="in the order of visits")
    parser.add_argument("--peft-gelu", default="gelu_new", choices=("gelu_new", "gelu_pytorch_tanh"))
    parser.add_argument("--override", action="append", default=[], metavar="section.key=value", help="of our cases")
    parser.add_argument("--out", type=Path, required=True, help="folder of report.json and report.md")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measure and report; raises UserError."""
    side.require_positive(options, "hidden", "heads", "sequence", "batch", "vocabulary", "rank", "steps", "rounds")
    if options.warm_up < 0:
        raise ConfigError(f"--warm-up {options.warm_up}: must be 0 or more")
    if options.hidden % options.heads:
        raise ConfigError(f"--hidden {options.hidden} is not a multiple of --heads {options.heads}")
    names = side.names_of(options.cases, (*OURS, *RIVALS), flag="--cases")
    sizes = side.sizes_of(options.layers, flag="--layers")
    if options.scale_to is not None and (len(sizes) != 2 or options.scale_to < sizes[-1]):
        raise ConfigError(f"--scale-to {options.scale_to} needs two smaller slices, such as --layers 2,4")
    cases = [Case(name, layers) for layers in sizes for name in names]
    configs = [config_of(case, options) for case in cases]
    side.claim(options.out, kind=KIND)
    groups.join_world()
    try:
        groups.build_mesh(layout_of(configs[0]), seed=1)
        for config in configs:
            check(config, shape_of(config), method_of(config, shape_of(config)), 1)
        _run(options, cases, sizes, tokens=tokens_per_step(configs[0]))
    finally:
        groups.stop()


def _run(options: argparse.Namespace, cases: Sequence[Case], sizes: Sequence[int], *, tokens: int) -> None:
    environment = describe_environment()
    for package in ("transformers", "peft"):
        try:
            environment["packages"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            environment["packages"][package] = None
    found = {case: Visits() for case in cases}
    for index, case in side.in_rounds(cases, options.rounds, enabled=True):
        if not found[case].out_of_memory:
            visit(case, options, found[case])
        report = {
            "kind": KIND,
            "complete": index == options.rounds - 1 and case == cases[-1],
            "command": side.command_line("bench_peft.py"),
            "options": {name: value for name, value in vars(options).items() if name != "out"},
            "tokens_per_step": tokens,
            "rows": with_ratios([row_of(case, visits, tokens=tokens) for case, visits in found.items()]),
            "scaled": scaled(found, sizes, options.scale_to, tokens=tokens),
            "environment": environment,
        }
        side.write_report(options.out, report, lines_of(report))
    print("\n".join(lines_of(report)))


def scaled(found: dict[Case, Visits], sizes: Sequence[int], layers: int | None, *, tokens: int) -> list[dict[str, Any]]:
    """Of each case measured at both sizes, what they say of `layers`: extrapolated, so called one in the report."""
    rows = []
    for name in dict.fromkeys(case.name for case in found):
        visits = [found[Case(name, size)] for size in sizes]
        if layers is None or any(one.out_of_memory or not one.seconds for one in visits):
            continue
        seconds = side.at_layers(sizes, [side.pooled(one.seconds)["median"] for one in visits], layers)
        activations = side.at_layers(sizes, [one.activations for one in visits], layers)
        assert seconds is not None
        rate = tokens / seconds if seconds > 0 else math.nan
        row = {"case": name, "layers": layers, "tokens_per_second": rate, "activation_bytes": activations}
        rows.append({**row, "peak_bytes": None, "step_seconds": {"median": seconds}, "out_of_memory": False})
    return with_ratios(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status as of `lora-megatron`."""
    options = parse(arguments)
    return side.status_of(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())

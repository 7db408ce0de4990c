# SPDX-License-Identifier: Apache-2.0
"""Where the time of a training step goes: every kernel of a slice of a configuration's model, by torch's profiler.

    python launch/profile_step.py launch/configs/gpt3_175b_1gpu.yaml --layers 1,3 --out runs/profile
    python launch/profile_step.py launch/configs/gpt3_175b_1gpu.yaml base.storage=bf16 base.gemm=null --out runs/bf16
    torchrun --nproc-per-node 2 launch/profile_step.py launch/configs/gpt3_175b_2gpu.yaml parallel.pipeline=1 \\
        parallel.tensor=2 parallel.sequence=true --out runs/profile2

Weights and tokens are random, as in `lora-megatron bench`. Two slices tell what one more layer adds, kernel by kernel:
head, loss and embedding cancel out. The times of steps are taken without the profiler, which slows launching down.
On several ranks the first one's kernels are shown. On a CPU torch's operations stand for kernels and say little.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from launch import side_by_side as side
from launch.kernel_times import KernelTime, kernel_times, kinds_of, per_layer, short_name
from lora_megatron.bench.communication import Kernel, communication_of, watch
from lora_megatron.bench.timing import TimedOptimizer, spread, timed_step
from lora_megatron.bench.workload import bench_config, build_trainer, free, method_of, slice_of
from lora_megatron.config import Config, ModelSection, load_config
from lora_megatron.errors import ConfigError
from lora_megatron.measure.environment import describe_environment
from lora_megatron.measure.markdown import table
from lora_megatron.measure.units import MISSING, show_seconds
from lora_megatron.model.checks import check, layout_of
from lora_megatron.model.presets import resolve_shape
from lora_megatron.model.shape import ModelShape
from lora_megatron.parallel import groups
from lora_megatron.parallel.agree import is_main, together
from lora_megatron.parallel.world import in_world
from lora_megatron.training.optimizer import Optimizer

KIND = "profile_step"
WARM_UP = 3


@dataclass(frozen=True)
class Profile:
    """Of one slice on this rank: seconds of whole steps, and the kernels of `steps` more, which took `watched_seconds`
    together."""

    layers: int
    step_seconds: list[float]
    kernels: list[Kernel]
    steps: int
    watched_seconds: float

    @property
    def times(self) -> list[KernelTime]:
        """Of one step."""
        return kernel_times(self.kernels, steps=self.steps)

    def to_dict(self) -> dict[str, Any]:
        """For report.json."""
        found = communication_of(self.kernels, steps=self.steps, whole=self.watched_seconds)
        return {
            "layers": self.layers,
            "step_seconds": spread(self.step_seconds),
            "watched_step_seconds": found.whole / found.steps,
            "busy_seconds": found.busy / found.steps,
            "exposed_communication_seconds": found.exposed / found.steps,
            "kernels": [asdict(time) for time in self.times],
        }


def visit(config: Config, shape: ModelShape, layers: int, steps: int) -> Profile:
    """Build a slice, time its steps, watch as many more, free it."""
    profile = _profile(config, slice_of(shape, layers), steps)
    free()
    return profile


def _profile(config: Config, shape: ModelShape, steps: int) -> Profile:
    trainer = build_trainer(config, shape, load=None)
    trainer.optimizer = cast(Optimizer, TimedOptimizer(trainer.optimizer))

    def step() -> float:
        return timed_step(trainer)[0].whole

    for _ in range(WARM_UP):
        step()
    seconds = [step() for _ in range(steps)]
    kernels, whole = watch(step, steps=steps)
    return Profile(shape.num_layers, seconds, kernels, steps, whole)


def lines_of(report: dict[str, Any], profiles: Sequence[Profile], top: int) -> list[str]:
    """The report in Markdown."""
    last, first = profiles[-1], profiles[0]
    lines = ["# Where a step's time goes", "", f"{side.hardware_text(report['environment'])}.", ""]
    slices = []
    for profile in profiles:
        row = profile.to_dict()
        taken = row["step_seconds"]
        cells = [taken["median"], row["busy_seconds"], row["exposed_communication_seconds"]]
        slices.append([str(profile.layers), *map(show_seconds, cells), side.spread_text(taken)])
    lines += table(["layers", "step, median", "kernels ran", "communication alone", "p10 to p90"], slices)
    whole, layer = last.times, None
    if len(profiles) == 2:
        layer = per_layer(first.times, whole, layers=last.layers - first.layers)
    shown = layer or whole
    title = "One more layer" if layer else f"A step of {side.layers_text(last.layers)}"
    total = sum(kernel.seconds for kernel in shown)
    kinds = [
        [kind, f"{launches:.1f}", show_seconds(seconds), f"{100 * seconds / total:.1f}%" if total else MISSING]
        for kind, (launches, seconds) in kinds_of(shown).items()
    ]
    lines += ["", f"## {title}", "", *table(["kind", "launches", "time", "share"], kinds)]
    rows = [
        [short_name(kernel.name), kernel.kind, f"{kernel.launches:.1f}", show_seconds(kernel.seconds)]
        for kernel in shown[:top]
    ]
    lines += [
        "",
        *table(["kernel", "kind", "launches", "time"], rows),
        "",
        "## Command",
        "",
        f"    {report['command']}",
    ]
    return lines


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, as for `lora-megatron bench`")
    parser.add_argument("overrides", nargs="*", help="section.key=value, or a second YAML file")
    parser.add_argument("--layers", default="1,3", help="one slice or two (default: 1,3)")
    parser.add_argument("--method", default="lora", help="as method.name (default: lora)")
    parser.add_argument("--steps", type=int, default=5, help="timed, and watched (default: 5 of each)")
    parser.add_argument("--top", type=int, default=30, help="kernels in the table (default: 30)")
    parser.add_argument("--out", type=Path, required=True, help="folder of report.json and report.md")
    return parser.parse_intermixed_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measure and report in the world torchrun started; raises UserError."""
    side.require_positive(options, "steps", "top")
    sizes = side.sizes_of(options.layers, flag="--layers")
    config = load_config(options.config, options.overrides)
    with in_world(timeout_minutes=config.parallel.timeout_minutes, streams_wait=config.parallel.pp_comm_copy):
        _run(options, config, sizes)


def _run(options: argparse.Namespace, config: Config, sizes: Sequence[int]) -> None:
    if not config.model.vocab_size:
        raise ConfigError("model.vocab_size is not set: a profile opens no tokenizer, so give the number of tokens")
    shape = resolve_shape(config.model, tokenizer_vocab_size=config.model.vocab_size)
    if sizes[-1] > shape.num_layers:
        raise ConfigError(f"--layers {sizes[-1]}: the model has {shape.num_layers}")
    config = config.model_copy(update={"model": ModelSection(**shape.to_dict())})
    if config.train.recompute == "auto":  # a slice fits
        config = config.model_copy(update={"train": config.train.model_copy(update={"recompute": "none"})})
    config = bench_config(config, options.method)
    ranks = groups.build_mesh(layout_of(config), seed=1)
    for part in (slice_of(shape, size) for size in sizes):
        check(config, part, method_of(config, part), ranks.world_size)
    together(lambda: side.claim(options.out, kind=KIND) if is_main() else None)
    profiles = [visit(config, shape, size, options.steps) for size in sizes]
    report = {
        "kind": KIND,
        "command": side.command_line("profile_step.py"),
        "world_size": ranks.world_size,
        "median_step_seconds": {str(one.layers): statistics.median(one.step_seconds) for one in profiles},
        "slices": [one.to_dict() for one in profiles],
        "environment": describe_environment(),
    }
    if is_main():
        lines = lines_of(report, profiles, options.top)
        side.write_report(options.out, report, lines)
        print("\n".join(lines))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status as of `lora-megatron`."""
    options = parse(arguments)
    return side.status_of(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())

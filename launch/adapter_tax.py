# SPDX-License-Identifier: Apache-2.0
"""What adapters cost: a step with LoRA over a step of the same frozen model with the same dgrad and no adapters.

    python launch/adapter_tax.py --out runs/adapter_tax
    torchrun --nproc-per-node 2 launch/adapter_tax.py --tensor 2 --sequence-parallel --out runs/adapter_tax_tp2

The reference has one adapter: rank 1 on q of layer 0. So the backward pass goes down to that layer, through every
frozen linear layer that it goes through with LoRA: from the loss to layer 0's attention output and MLP, and not into
layer 0's q, k and v, whose input (the embedding) needs no gradient either way. Both have clipping and AdamW.

    tax of a slice    t(LoRA) / t(reference) - 1 with head and embedding, of a whole step and of both passes alone
    tax of a layer    the same of (t(large) - t(small)) / (large - small): the head and layer 0, which the reference
                      adapts a little, cancel out
    tax of a model    the same of the line through both slices at --scale-to layers

A tax is a small difference of large times, and a clock wanders: with adapters and without, a slice stands in memory
beside itself, and both step in turns of five. Each round builds every slice anew and gives one tax; what is reported is
the median over rounds with the lowest and the highest. Sizes such as --hidden 64 --heads 2 --layers 1,2 --sequence 16
--vocabulary 100 run on a CPU, where times say nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from launch import side_by_side as side
from launch.adapter_tax_cases import STORAGES, TARGETS, Case, Pair, config_of, shape_of
from lora_megatron.bench import measurement
from lora_megatron.bench.measurement import Effort, Measured, OutOfMemory
from lora_megatron.bench.plans import known_of
from lora_megatron.errors import ConfigError, OutOfMemoryAlone
from lora_megatron.measure.environment import describe_environment
from lora_megatron.measure.markdown import table
from lora_megatron.measure.units import MISSING, show_bytes, show_seconds
from lora_megatron.methods.choose import choose_method
from lora_megatron.model.checks import check, layout_of
from lora_megatron.parallel import groups
from lora_megatron.parallel.agree import is_main, together
from lora_megatron.parallel.world import in_world

KIND = "adapter_tax"
PARTS = {"whole": "step", "forward_backward": "forward, backward"}
"""What is compared: --microbatches divides the optimizer's share of a step, and leaves that of the passes as it is."""
TURN = 5
"""Steps, some tenths of a second, so that a card may find the clock that its power allows to each: chosen, not
measured."""


def visit(pair: Pair, options: argparse.Namespace) -> tuple[Measured, ...]:
    """Build both cases, let them step in turns, free them; collective. Raises ConfigError where they do not fit."""
    configs = [config_of(case, options) for case in pair.cases]
    shape, whole = shape_of(configs[0]), measurement.Case("lora", pair.layers)
    planned = sum(max(kinds["peak"] for kinds in known_of(whole, config, shape).planned) for config in configs)
    cases, effort = [(whole, config) for config in configs], Effort(options.steps, options.warm_up)
    remedy = (
        f"{pair}, with adapters and without beside each other: out of memory; planned {show_bytes(planned)} "
        f"of {show_bytes(groups.device_memory_bytes())}: lower --layers or --batch, or raise --tensor"
    )
    try:
        found = measurement.visit_in_turns(cases, shape, effort, turn=TURN, planned_bytes=planned)
    except OutOfMemoryAlone:
        raise OutOfMemoryAlone(remedy) from None
    if isinstance(found, OutOfMemory):
        raise ConfigError(remedy)
    return tuple(found)


def tax_row(
    storage: str, sizes: Sequence[int], found: dict[Case, list[Measured]], *, part: str, scale_to: int
) -> dict[str, Any]:
    """Taxes of one storage over the rounds in which all its cases have been visited; `part` as in PARTS."""
    rounds = min(len(found[case]) for case in found if case.storage == storage)

    def medians(adapted: bool, index: int) -> list[float]:
        """Of each slice, in one round."""
        visits = [found[Case(storage, size, adapted)][index] for size in sizes]
        return [statistics.median(getattr(step, part) for step in visit.steps) for visit in visits]

    pairs = [(medians(True, index), medians(False, index)) for index in range(rounds)]
    row: dict[str, Any] = {"storage": storage, "part": part, "slices": {}}
    for place, size in enumerate(sizes):
        row["slices"][str(size)] = _over_rounds([lora[place] / reference[place] - 1 for lora, reference in pairs])
    if len(sizes) == 2:
        slopes = [(side.per_layer(sizes, lora), side.per_layer(sizes, reference)) for lora, reference in pairs]
        wholes = [(side.at_layers(sizes, lora, scale_to), side.at_layers(sizes, ref, scale_to)) for lora, ref in pairs]
        row["layer"] = _over_rounds([lora / ref - 1 for lora, ref in slopes if lora and ref and ref > 0])
        row["model"] = _over_rounds([lora / ref - 1 for lora, ref in wholes if lora and ref and ref > 0])
    return row


def _over_rounds(taxes: Sequence[float]) -> dict[str, Any] | None:
    if not taxes:
        return None
    return {"median": statistics.median(taxes), "lowest": min(taxes), "highest": max(taxes), "rounds": list(taxes)}


def case_row(case: Case, visits: Sequence[Measured]) -> dict[str, Any]:
    """Times, memory and counts of a case over its visits."""
    largest = max((memory for visit in visits for memory in visit.memory), key=lambda memory: memory.peak)
    parts = {"step": "whole", "forward_backward": "forward_backward", "optimizer": "optimizer"}
    seconds = {
        f"{name}_seconds": side.pooled([[getattr(step, part) for step in visit.steps] for visit in visits])
        for name, part in parts.items()
    }
    return {
        "storage": case.storage,
        "layers": case.layers,
        "adapted": case.adapted,
        **seconds,
        "peak_bytes": largest.peak,
        "activation_bytes": largest.activations,
        "trained_parameters": visits[0].trainable_parameters,
        "last_loss": visits[-1].last_loss,
    }


def lines_of(report: dict[str, Any]) -> list[str]:
    """The report in Markdown."""
    options = report["options"]
    layout = f"TP={options['tensor']}" + (" with sequence parallelism" if options["sequence_parallel"] else "")
    lines = [f"# Adapter tax at width {options['hidden']}, {layout}", ""]
    if not report["complete"]:
        lines += ["**Not complete: still running, or ended before its last step.**", ""]
    rows = []
    for row in report["taxes"]:
        of = [(side.layers_text(int(size)), tax) for size, tax in row["slices"].items()]
        if "layer" in row:
            of += [("one more layer", row["layer"])]
            of += [(f"{side.layers_text(options['scale_to'])}, extrapolated", row["model"])]
        rows += [[f"{row['storage']}: {PARTS[row['part']]}", text, *_tax_cells(tax)] for text, tax in of]
    lines += table(["storage: time", "of", "tax, median of rounds", "lowest to highest"], rows)
    columns = ["case", "step, median", "p10 to p90", "forward, backward", "optimizer", "peak", "activations"]
    lines += table(columns, [_case_cells(row) for row in report["rows"]])
    targets = f"LoRA of rank {options['rank']} on {options['targets']}; reference: rank 1 on q of layer 0 alone"
    count = f"{options['microbatches']} microbatch{'es' if options['microbatches'] > 1 else ''} a step"
    batch = f"{count}, each of {options['batch']} x {options['sequence']} tokens, bf16, random weights and tokens"
    steps = f"{options['rounds']} rounds, {options['steps']} steps a visit after {options['warm_up']}"
    return lines + side.notes_lines(
        [f"{targets}. {batch}. {steps}.", side.hardware_text(report["environment"]), report["command"]]
    )


def _tax_cells(tax: dict[str, Any] | None) -> list[str]:
    if tax is None:
        return [MISSING, MISSING]
    return [f"{100 * tax['median']:.1f}%", f"{100 * tax['lowest']:.1f}% to {100 * tax['highest']:.1f}%"]


def _case_cells(row: dict[str, Any]) -> list[str]:
    return [
        str(Case(row["storage"], row["layers"], row["adapted"])),
        show_seconds(row["step_seconds"]["median"]),
        side.spread_text(row["step_seconds"]),
        show_seconds(row["forward_backward_seconds"]["median"]),
        show_seconds(row["optimizer_seconds"]["median"]),
        show_bytes(row["peak_bytes"]),
        show_bytes(row["activation_bytes"]),
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, what in (
        ("hidden", 12288, "width"),
        ("heads", 96, "attention heads"),
        ("sequence", 2048, "tokens in a row"),
        ("batch", 1, "rows in a microbatch"),
        ("microbatches", 1, "in a step"),
        ("vocabulary", 50257, "tokens known"),
        ("rank", 16, "of LoRA on every target"),
        ("tensor", 1, "tensor-parallel ranks"),
        ("steps", 10, "measured ones in a visit"),
        ("warm-up", 3, "steps before them"),
        ("rounds", 3, "visits to every slice"),
        ("scale-to", 96, "layers of the whole model"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: {default})")
    parser.add_argument("--layers", default="2,4", help="one slice or two (default: 2,4)")
    parser.add_argument("--storage", default="bf16,fp8", help=f"among {', '.join(STORAGES)} (default: bf16,fp8)")
    parser.add_argument("--targets", default=",".join(TARGETS), help=f"(default: {','.join(TARGETS)})")
    parser.add_argument("--sequence-parallel", action="store_true", help="shard activations over the tensor ranks")
    parser.add_argument("--cuda-graph", action="store_true", help="train.cuda_graph: no time of the host in the tax")
    parser.add_argument("--attention", default="torch", help="train.attention, torch or fa4 (default: torch)")
    parser.add_argument("--out", type=Path, required=True, help="folder of report.json and report.md")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measure and report in the world torchrun started; raises UserError."""
    counts = "hidden heads sequence batch microbatches vocabulary rank tensor steps rounds scale_to"
    side.require_positive(options, *counts.split())
    if options.warm_up < 0:
        raise ConfigError(f"--warm-up {options.warm_up}: must be 0 or more")
    sizes = side.sizes_of(options.layers, flag="--layers")
    storages = side.names_of(options.storage, tuple(STORAGES), flag="--storage")
    pairs = [Pair(name, size) for name in storages for size in sizes]
    with in_world():
        _run(options, pairs, sizes, storages)


def _run(options: argparse.Namespace, pairs: Sequence[Pair], sizes: Sequence[int], storages: Sequence[str]) -> None:
    cases = [case for pair in pairs for case in pair.cases]
    ranks = groups.build_mesh(layout_of(config_of(cases[0], options)), seed=1)
    for case in cases:
        config = config_of(case, options)
        check(config, shape_of(config), choose_method(config.method, num_layers=case.layers), ranks.world_size)
    together(lambda: side.claim(options.out, kind=KIND) if is_main() else None)
    environment, report = describe_environment(), {}
    found: dict[Case, list[Measured]] = {case: [] for case in cases}
    for index, pair in side.in_rounds(pairs, options.rounds, enabled=is_main()):
        for case, measured in zip(pair.cases, visit(pair, options), strict=True):
            found[case].append(measured)
        report = {
            "kind": KIND,
            "complete": index == options.rounds - 1 and pair == pairs[-1],
            "command": side.command_line("adapter_tax.py"),
            "options": {name: value for name, value in vars(options).items() if name != "out"},
            "world_size": ranks.world_size,
            "taxes": [
                tax_row(storage, sizes, found, part=part, scale_to=options.scale_to)
                for storage in storages
                for part in PARTS
            ],
            "rows": [case_row(case, visits) for case, visits in found.items() if visits],
            "environment": environment,
        }
        together(lambda report=report: side.write_report(options.out, report, lines_of(report)) if is_main() else None)
    if is_main():
        print("\n".join(lines_of(report)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status as of `lora-megatron`."""
    options = parse(arguments)
    return side.status_of(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())

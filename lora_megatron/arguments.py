# SPDX-License-Identifier: Apache-2.0
"""The arguments of every command. Nothing here imports torch: `--help` must not wait for it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from lora_megatron import __version__
from lora_megatron.commands.decoding_arguments import add_evaluate, add_generate

_EXAMPLES = """examples:
  lora-megatron quickstart --out runs/quickstart
  lora-megatron train config.yaml train.steps=200 optimizer.lr=1e-4
  torchrun --standalone --nproc-per-node 2 -m lora_megatron train config.yaml parallel.tensor=2
  lora-megatron plan launch/configs/gpt3_175b_plan.yaml
  lora-megatron bench config.yaml --methods lora,full
  lora-megatron evaluate config.yaml --adapter runs/r8/adapter --task e2e --data data/e2e --out runs/r8/e2e-test
  lora-megatron merge --base path/to/model --adapter runs/r8/adapter --out path/to/merged

exit status: 0 done, 2 configuration, 3 data, 4 checkpoint or disk, 5 numerical, 6 a hang or a lost rank,
75 preempted by a signal (start again with run.resume=auto), 130 interrupted (Ctrl-C in any command but train)
(torchrun itself reports 1 for any of them; once a run has claimed its folder, status.json there keeps ours)"""


def build_parser() -> argparse.ArgumentParser:
    """The commands and their arguments."""
    parser = argparse.ArgumentParser(
        prog="lora-megatron",
        description="LoRA fine-tuning inside a Megatron-Core GPT.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lora-megatron {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train as a configuration says",
        description="Train as a configuration says: LoRA, full fine-tuning or another method, on the ranks torchrun "
        "started (one under plain python).",
        epilog="example: lora-megatron train config.yaml method.targets='{q: 8, v: 8}' run.dir=runs/r8",
    )
    _add_configuration(train)
    _add_plan(commands)
    _add_bench(commands)
    _add_score(commands)
    _add_configuration(add_generate(commands))
    _add_configuration(add_evaluate(commands))
    doctor = commands.add_parser(
        "doctor",
        help="say what of the optional software is here, and what its absence costs",
        description="Look at the GPU, NCCL, Triton, apex, Transformer Engine, DeepSpeed and bitsandbytes: there, "
        "right or wrong, and what it costs to do without.",
        epilog="example: lora-megatron doctor --json",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of a table")

    merge = commands.add_parser(
        "merge",
        help="put an adapter into the weights of its Hugging Face base",
        description="Write a Hugging Face model whose weights are the base's with an adapter merged in: same files and "
        "types, tokenizer and configuration beside them. Needs no GPU and holds one tensor at a time.",
        epilog="example: lora-megatron merge --base path/to/model --adapter runs/r8/adapter --out path/to/merged",
    )
    _add_folders(merge, adapter="the folder `adapter` of a run")
    merge.add_argument("--any-base", action="store_true", help="take another base than the adapter's if shapes fit")

    export = commands.add_parser(
        "export",
        help="write an adapter as one that PEFT loads",
        description="Write an adapter of this project as a PEFT adapter folder for its Hugging Face base. Where the "
        "family keeps q, k and v in one matrix they are stacked into one adapter of it, exactly.",
        epilog="example: lora-megatron export --base path/to/model --adapter runs/r8/adapter --out r8-peft",
    )
    _add_folders(export, adapter="the folder `adapter` of a run")
    export.add_argument("--any-base", action="store_true", help="take another base than the adapter's if shapes fit")

    import_ = commands.add_parser(
        "import",
        help="take a PEFT adapter in",
        description="Write a PEFT LoRA adapter of a Hugging Face base as an adapter of this project: to train on "
        "(method.start_from), merge, or load into a sharded model.",
        epilog="example: lora-megatron import --base path/to/model --adapter path/to/peft --out adapters/mine",
    )
    _add_folders(import_, adapter="PEFT's folder (adapter_config.json and safetensors)")

    inspect = commands.add_parser(
        "inspect",
        help="say what a model, adapter, checkpoint or run is, without loading it",
        description="Describe a Hugging Face model, a model or adapter of this project, a PEFT adapter, a training "
        "checkpoint or a run folder: family, shape, ranks, parameters, bytes, fingerprint. Only headers are read.",
        epilog="example: lora-megatron inspect runs/r8/adapter --json",
    )
    inspect.add_argument("path", help="the folder")
    inspect.add_argument("--json", action="store_true", help="print one JSON object instead of a table")

    report = commands.add_parser(
        "report",
        help="write report.html of a run that is going on or ended early",
        description="Write report.html into a run's folder from what is there: a training that ends well does it by "
        "itself, one that is going on, was preempted or failed has it made by this command.",
        epilog="example: lora-megatron report runs/r8",
    )
    report.add_argument("run", help="the folder of the run")

    quickstart = commands.add_parser(
        "quickstart",
        help="a whole small experiment in minutes, on a CPU",
        description="Generate a corpus, train a small base, adapt it with LoRA under tensor parallelism, fine-tune it "
        "fully for comparison, and report.",
        epilog="example: lora-megatron quickstart --out runs/quickstart --seed 7",
    )
    quickstart.add_argument("--out", default="runs/quickstart", help="folder to write (default: %(default)s)")
    quickstart.add_argument("--seed", type=int, default=7, help="seed of everything random (default: %(default)s)")
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; overrides may also stand after options (`plan a.yaml --gpu h200 train.precision=bf16`)."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    late = [word for word in rest if not word.startswith("-")]
    if len(late) < len(rest) or (late and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if late:
        arguments.overrides += late
    return arguments


def _add_configuration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file with the sections model, base, method, parallel, ... (see README)")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="values that win over the file's, or another YAML file whose keys do",
    )


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="memory, checkpoint, FLOPs and speed before any GPU is touched",
        description="Plan a training: bytes on every rank by kind, for the configuration and for full fine-tuning "
        "beside it; whether it fits; the expected speed. With --gpus, search the layouts of that many GPUs.",
        epilog="examples:\n  lora-megatron plan launch/configs/gpt3_175b_plan.yaml\n"
        "  lora-megatron plan config.yaml --gpus 16 --gpu-memory 80 --gpu h100 --png plan.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_configuration(plan)
    plan.add_argument("--gpus", type=int, help="rank every layout of so many GPUs instead of the configuration's own")
    plan.add_argument("--gpu-memory", type=float, metavar="GB", help="memory of one GPU in GB; default: that of --gpu")
    plan.add_argument("--gpu", default="h100", help="GPU for the expected speed, such as v100, a100, h100, h200")
    plan.add_argument("--data-parallel", type=int, default=1, help="replicas of the model (default: %(default)s)")
    plan.add_argument("--png", metavar="FILE", help="draw the memory of the ranks as a bar chart")
    plan.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure LoRA against full fine-tuning with the same shards, data and steps",
        description="Measure methods side by side on the ranks torchrun started: speed, memory by kind, TFLOP/s, share "
        "of the matrix product rate measured in the same run, and what the plan said.",
        epilog="examples:\n  lora-megatron bench config.yaml --methods lora,full,bitfit\n"
        "  torchrun --standalone --nproc-per-node 2 -m lora_megatron bench config.yaml parallel.tensor=2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_configuration(bench)
    bench.add_argument("--methods", default="lora,full", help="comma-separated methods (default: %(default)s)")
    bench.add_argument("--steps", type=int, default=10, help="measured steps (default: %(default)s)")
    bench.add_argument("--warm-up", type=int, default=3, help="steps before them (default: %(default)s)")
    bench.add_argument("--visits", type=int, choices=(1, 2), default=2, help="times a case is built (default: 2)")
    bench.add_argument("--layers", type=int, help="measure a slice of so many layers; default: as many as fit")
    bench.add_argument("--profile", type=int, default=0, metavar="N", help="more steps, for communication's share")
    bench.add_argument("--no-ceiling", dest="ceiling", action="store_false", help="do not time the products alone")
    bench.add_argument("--out", default="runs/bench", help="folder to write (default: %(default)s)")


def _add_score(commands: Any) -> None:
    score = commands.add_parser(
        "score",
        help="score predictions in text files by the metrics of a task",
        description="Score predictions against references, as the task's official scripts do, with 95% intervals. "
        "A metric that cannot be computed here is named, with the reason.",
        epilog="examples:\n  lora-megatron score --task e2e --predictions predictions.txt --references references.txt\n"
        "  lora-megatron score --task wikisql --predictions p.txt --references r.txt --metas metas.jsonl --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    score.add_argument("--task", required=True, help="wikisql, mnli, samsum, e2e, dart, webnlg, or text for any other")
    score.add_argument("--predictions", required=True, metavar="FILE", help="UTF-8 text, a prediction a line")
    score.add_argument(
        "--references",
        required=True,
        metavar="FILE",
        help="UTF-8 text, a reference a line; those of one instance on lines in a row, a blank line between",
    )
    score.add_argument("--metas", metavar="FILE", help="for wikisql's execution: the data's column meta, a line each")
    score.add_argument("--bootstrap", type=int, default=1000, help="resamples of the intervals (default: %(default)s)")
    score.add_argument("--seed", type=int, default=0, help="of the resamples (default: %(default)s)")
    score.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def _add_folders(parser: argparse.ArgumentParser, *, adapter: str) -> None:
    parser.add_argument("--base", required=True, help="folder of the Hugging Face model the adapter was trained on")
    parser.add_argument("--adapter", required=True, help=adapter)
    parser.add_argument("--out", required=True, help="folder to write, which must not exist or be empty")

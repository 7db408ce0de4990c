# SPDX-License-Identifier: Apache-2.0
"""The command line: `lora-megatron COMMAND ...`, the same as `python -m lora_megatron COMMAND ...`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from lora_megatron import __version__
from lora_megatron.errors import EXIT_DONE, UserError

_EXAMPLES = """examples:
  lora-megatron quickstart --out runs/quickstart
  lora-megatron train config.yaml train.steps=200 optimizer.lr=1e-4
  torchrun --standalone --nproc-per-node 2 -m lora_megatron train config.yaml parallel.tensor=2
  lora-megatron merge --base path/to/model --adapter runs/r8/adapter --out path/to/merged

exit status: 0 done, 2 configuration, 3 data, 4 checkpoint or disk, 5 numerical
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
    train.add_argument("config", help="YAML file with the sections model, base, method, parallel, ... (see README)")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that win over the file's")

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


def _add_folders(parser: argparse.ArgumentParser, *, adapter: str) -> None:
    parser.add_argument("--base", required=True, help="folder of the Hugging Face model the adapter was trained on")
    parser.add_argument("--adapter", required=True, help=adapter)
    parser.add_argument("--out", required=True, help="folder to write, which must not exist or be empty")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a user's error is one line on stderr and its exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        _run(arguments)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_status
    return EXIT_DONE


def _run(arguments: argparse.Namespace) -> None:
    # Each command imports what it needs when it runs: `--help` must not wait for torch.
    if arguments.command == "train":
        from lora_megatron.config import load_config

        config = load_config(arguments.config, arguments.overrides)  # a typing error shows before torch is imported
        from lora_megatron.commands.train import run_training

        run_training(config)
    elif arguments.command == "merge":
        from pathlib import Path

        from lora_megatron.commands.merge import run_merge

        run_merge(Path(arguments.base), Path(arguments.adapter), Path(arguments.out), any_base=arguments.any_base)
    elif arguments.command in ("export", "import"):
        from pathlib import Path

        from lora_megatron.commands.convert import run_export, run_import

        base, adapter, out = Path(arguments.base), Path(arguments.adapter), Path(arguments.out)
        if arguments.command == "export":
            run_export(base, adapter, out, any_base=arguments.any_base)
        else:
            run_import(base, adapter, out)
    elif arguments.command == "inspect":
        from pathlib import Path

        from lora_megatron.commands.inspect import run_inspect

        run_inspect(Path(arguments.path), as_json=arguments.json)
    else:
        from pathlib import Path

        from lora_megatron.quickstart import run_quickstart

        run_quickstart(Path(arguments.out), seed=arguments.seed)


if __name__ == "__main__":
    sys.exit(main())

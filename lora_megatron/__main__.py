# SPDX-License-Identifier: Apache-2.0
"""The command line: `lora-megatron COMMAND ...`, the same as `python -m lora_megatron COMMAND ...`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from lora_megatron.arguments import build_parser
from lora_megatron.errors import EXIT_DONE, UserError


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
    if arguments.command in ("train", "plan", "bench"):
        _run_configured(arguments)
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
    elif arguments.command == "doctor":
        from lora_megatron.commands.doctor import run_doctor

        run_doctor(as_json=arguments.json)
    elif arguments.command == "inspect":
        from pathlib import Path

        from lora_megatron.commands.inspect import run_inspect

        run_inspect(Path(arguments.path), as_json=arguments.json)
    else:
        from pathlib import Path

        from lora_megatron.quickstart import run_quickstart

        run_quickstart(Path(arguments.out), seed=arguments.seed)


def _run_configured(arguments: argparse.Namespace) -> None:
    from lora_megatron.config import load_config

    config = load_config(arguments.config, arguments.overrides)  # a typing error shows before torch is imported
    if arguments.command == "train":
        from lora_megatron.commands.train import run_training

        run_training(config)
    elif arguments.command == "plan":
        from lora_megatron.commands.plan import run_plan

        run_plan(
            config,
            gpus=arguments.gpus,
            gpu=arguments.gpu,
            gpu_memory_gb=arguments.gpu_memory,
            data_parallel=arguments.data_parallel,
            png=arguments.png,
            as_json=arguments.json,
        )
    else:
        from lora_megatron.commands.bench import run_bench

        run_bench(
            config,
            methods=arguments.methods.split(","),
            steps=arguments.steps,
            warm_up=arguments.warm_up,
            layers=arguments.layers,
            out=arguments.out,
        )


if __name__ == "__main__":
    sys.exit(main())

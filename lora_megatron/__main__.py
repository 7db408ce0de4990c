# SPDX-License-Identifier: Apache-2.0
"""The command line: `lora-megatron COMMAND ...`, the same as `python -m lora_megatron COMMAND ...`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from lora_megatron.arguments import parse_arguments
from lora_megatron.errors import (
    EXIT_BROKEN_PIPE,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    LostRankError,
    Preempted,
    UserError,
)
from lora_megatron.parallel.launcher import die_with_parent, is_rank, leave_others


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a user's error is one line on stderr and its exit status, and so is whatever else ends it."""
    if is_rank():
        die_with_parent()
    try:
        _run(parse_arguments(argv))
        sys.stdout.flush()  # while a reader that has gone can still be met here
    except LostRankError as error:
        _say(f"error: {error}", error.told_by)
        os._exit(error.exit_status)  # nothing that waits for the others may run, such as NCCL's destructors
    except UserError as error:
        _say(f"error: {error}", error.told_by)
        return error.exit_status
    except Preempted as preempted:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)  # an impatient second one must not change the status that is due
        _say(f"preempted: {preempted}")
        return preempted.exit_status
    except KeyboardInterrupt:
        _say("interrupted")
        return EXIT_INTERRUPTED
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):  # rich exits with 1
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at exit
        return EXIT_BROKEN_PIPE
    except Exception:  # any bug: none is handled, but a rank that unwinds from it may wait for the others for ever
        leave_others()
        raise
    return EXIT_DONE


def _say(text: str, told_by: str = "main") -> None:
    rank, of_node = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    if rank == "0" or told_by == "rank" or (told_by == "node" and of_node == "0"):
        print(text if rank == "0" else f"rank {rank}: {text}", file=sys.stderr, flush=True)


def _run(arguments: argparse.Namespace) -> None:
    # Each command imports what it needs when it runs: `--help` must not wait for torch.
    if arguments.command in ("train", "plan", "bench"):
        _run_configured(arguments)
    elif arguments.command in ("generate", "evaluate"):
        _run_decoding(arguments)
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
    elif arguments.command == "score":
        from pathlib import Path

        from lora_megatron.commands.score import run_score

        run_score(
            arguments.task,
            Path(arguments.predictions),
            Path(arguments.references),
            metas=None if arguments.metas is None else Path(arguments.metas),
            bootstrap=arguments.bootstrap,
            seed=arguments.seed,
            as_json=arguments.json,
        )
    elif arguments.command == "report":
        from pathlib import Path

        from lora_megatron.commands.report import run_report

        run_report(Path(arguments.run))
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
            visits=arguments.visits,
            profiled=arguments.profile,
            ceiling=arguments.ceiling,
            out=arguments.out,
        )


def _run_decoding(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from lora_megatron.commands.decoding_arguments import decoding_from
    from lora_megatron.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    decoding = decoding_from(arguments, getattr(arguments, "task", None))  # so does a flag that cannot work
    common = {
        "decoding": decoding,
        "adapter": Path(arguments.adapter) if arguments.adapter else None,
        "batch_size": arguments.batch_size,
        "cut_prompts": arguments.cut_prompts,
    }
    if arguments.command == "generate":
        from lora_megatron.commands.generate import GenerationOptions, run_generation

        file, out = (Path(path) if path else None for path in (arguments.prompts, arguments.out))
        run_generation(config, GenerationOptions(prompts=tuple(arguments.prompt), file=file, out=out, **common))
    else:
        from lora_megatron.commands.evaluate import EvaluationOptions, run_evaluation

        run_evaluation(
            config,
            EvaluationOptions(
                task=arguments.task,
                out=Path(arguments.out),
                data=Path(arguments.data) if arguments.data else None,
                split=arguments.split,
                limit=arguments.limit,
                bootstrap=arguments.bootstrap,
                **common,
            ),
        )


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""The arguments of `generate` and `evaluate`. Nothing here imports torch: `--help` must not wait for it."""

from __future__ import annotations

import argparse
from typing import Any

from lora_megatron.evaluation.defaults import decoding_of
from lora_megatron.evaluation.settings import Decoding

_ADAPTER = "the folder `adapter` of a run; without it the base alone, such as base.weights=RUN/model of a full training"
_FLAGS = (
    "max_new_tokens",
    "beams",
    "length_penalty",
    "early_stopping",
    "no_repeat_ngram",
    "sample",
    "temperature",
    "top_k",
    "top_p",
    "seed",
)


def add_generate(commands: Any) -> argparse.ArgumentParser:
    """The command `generate`, to which CONFIG is to be added."""
    generate: argparse.ArgumentParser = commands.add_parser(
        "generate",
        help="continue prompts by a model and an adapter",
        description="Continue prompts by the model of a training's configuration and an adapter, on the ranks torchrun "
        "started (one under plain python). A prompt is followed by a line end, as contexts are in training.",
        epilog="examples:\n"
        "  lora-megatron generate config.yaml --adapter runs/r8/adapter --prompt 'name : Aromi | area : riverside'\n"
        "  torchrun --standalone --nproc-per-node 2 -m lora_megatron generate config.yaml parallel.tensor=2 \\\n"
        "      --adapter runs/r8/adapter --prompts prompts.txt --out continued.jsonl --beams 10 --length-penalty 0.8",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    generate.add_argument("--adapter", help=_ADAPTER)
    generate.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be repeated")
    generate.add_argument(
        "--prompts", metavar="FILE", help="a prompt in each line; of a .jsonl the object's `context` or `prompt`"
    )
    generate.add_argument("--out", metavar="FILE", help="write JSON Lines instead of printing")
    _add_decoding(generate, "greedy without --beams and --sample")
    return generate


def add_evaluate(commands: Any) -> argparse.ArgumentParser:
    """The command `evaluate`, to which CONFIG is to be added."""
    evaluate: argparse.ArgumentParser = commands.add_parser(
        "evaluate",
        help="predict a task's rows and score them, with confidence intervals",
        description="Predict the rows of a prepared file by the model of a training's configuration and an adapter, on "
        "the ranks torchrun started, and score them by the task's metrics. Writes predictions.jsonl (a line a "
        "row, as they come), scores.json and a table. The same command goes on where an interrupted one ended.",
        epilog="examples:\n"
        "  lora-megatron evaluate config.yaml --adapter runs/r8/adapter --task e2e --data data/e2e --split test \\\n"
        "      --out runs/r8/e2e-test\n"
        "  torchrun --standalone --nproc-per-node 4 -m lora_megatron evaluate config.yaml parallel.tensor=2 \\\n"
        "      --adapter runs/mnli/adapter --task mnli --limit 1000 --out runs/mnli/first-1000\n\n"
        "e2e, webnlg and dart are decoded as the LoRA paper's GPT-2 (10 beams, length penalty 0.8, no 4-gram twice in\n"
        "the continuation), other texts greedily; of mnli the likeliest label is taken.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("--adapter", help=_ADAPTER)
    evaluate.add_argument(
        "--task", required=True, metavar="NAME", help="e2e, webnlg, dart, wikisql, mnli, samsum, text"
    )
    evaluate.add_argument("--out", required=True, metavar="DIR", help="folder for predictions.jsonl and scores.json")
    evaluate.add_argument(
        "--data", metavar="PATH", help="a Parquet file or the folder of a prepared data set; default: data.validation"
    )
    evaluate.add_argument(
        "--split", metavar="NAME", help="file of that folder, such as test (its default) or validation"
    )
    evaluate.add_argument("--limit", type=int, metavar="N", help="the first N rows alone")
    evaluate.add_argument(
        "--bootstrap", type=int, default=1000, metavar="N", help="resamples behind an interval (default: %(default)s)"
    )
    _add_decoding(evaluate, "what is not given is the task's, see below")
    return evaluate


def decoding_from(arguments: argparse.Namespace, task: str | None = None) -> Decoding:
    """The decoding that the flags ask for. Raises ConfigError, see `decoding_of`."""
    given = {name: getattr(arguments, name) for name in _FLAGS}
    if arguments.repeat_prompt is not None:
        given["no_repeat_prompt"] = not arguments.repeat_prompt
    return decoding_of(task, given)


def _add_decoding(parser: argparse.ArgumentParser, default: str) -> None:
    switch = argparse.BooleanOptionalAction
    group = parser.add_argument_group("decoding", f"transformers' terms; {default}")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="longest continuation (default: 128)")
    group.add_argument("--beams", type=int, metavar="N", help="beam search with so many; 1 is greedy")
    group.add_argument("--length-penalty", type=float, metavar="X", help="a beam counts log probability / tokens ** X")
    group.add_argument("--early-stopping", action=switch, help="end with as many finished beams as beams")
    group.add_argument("--no-repeat-ngram", type=int, metavar="N", help="no sequence of N tokens twice; 0 allows all")
    group.add_argument("--repeat-prompt", action=switch, help="those N tokens may stand in the prompt (default: not)")
    group.add_argument("--sample", action="store_const", const=True, help="draw tokens instead of the likeliest")
    group.add_argument("--temperature", type=float, metavar="X", help="of --sample")
    group.add_argument("--top-k", type=int, metavar="N", help="of --sample: among the N likeliest tokens; 0 is all")
    group.add_argument("--top-p", type=float, metavar="X", help="of --sample: among the likeliest with probability X")
    group.add_argument("--seed", type=int, metavar="N", help="of --sample; a draw depends on it and the row alone")
    group.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="prompts a rank decodes together; default: 64 / beams, a GPU takes many more",
    )
    group.add_argument("--cut-prompts", action="store_true", help="drop the beginning of prompts that are too long")

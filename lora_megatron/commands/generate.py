# SPDX-License-Identifier: Apache-2.0
"""`lora-megatron generate`: what a model says to some prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_megatron.commands.decoding_model import ADVICE, plan_model, say
from lora_megatron.commands.joined import joined
from lora_megatron.config import Config
from lora_megatron.errors import ConfigError, DataError
from lora_megatron.evaluation.answering import Answer, Continuing
from lora_megatron.evaluation.answers import answers
from lora_megatron.evaluation.decoder import decoding
from lora_megatron.evaluation.rows import Instance, prompts_of
from lora_megatron.evaluation.settings import Decoding
from lora_megatron.measure.atomic import write_text
from lora_megatron.measure.rows_progress import RowsProgress
from lora_megatron.parallel.agree import is_main, require_equal, together
from lora_megatron.strict_json import NotStrictJson, parse_json

_MOST_BYTES = 2**30
_FIELDS = ("context", "prompt")


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """What the command line says besides the configuration."""

    decoding: Decoding
    prompts: tuple[str, ...] = ()
    file: Path | None = None
    out: Path | None = None
    adapter: Path | None = None
    batch_size: int | None = None
    cut_prompts: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError for what cannot be."""
        if bool(self.prompts) == (self.file is not None):
            raise ConfigError("give --prompt TEXT (once or more), or --prompts FILE, and not both")
        if any(not text.strip() for text in self.prompts):
            raise ConfigError("--prompt is empty: give it a text to continue")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"--batch-size {self.batch_size} cannot be: give 1 or more")
        if self.out is not None and (self.out.is_dir() or not self.out.absolute().parent.is_dir()):
            raise ConfigError(f"--out {self.out}: give the name of a file in a folder that exists")


def run_generation(config: Config, options: GenerationOptions) -> None:
    """Continue the prompts, on all ranks torchrun started (one under plain python); print or write the continuations.

    Raises:
        UserError: every way a user's input can fail; see `lora_megatron.errors` for the exit statuses.
        Preempted: a termination signal; nothing is written.
    """
    with joined(config, **ADVICE):
        require_equal("the command line", repr(options))
        texts = together(lambda: list(options.prompts) if options.file is None else read_prompts(options.file))
        require_equal("the prompts", json.dumps(texts))
        model = plan_model(config, options.adapter)
        answering = together(
            lambda: Continuing(options.decoding, model.tokenizer, model.positions, options.cut_prompts)
        )
        rows = [Instance(str(number), text, ()) for number, text in enumerate(texts)]
        prompts = together(lambda: answering.fit(prompts_of(rows, model.tokenizer)))
        chunks, _ = model.build()
        say(f"continuing {len(texts)} prompts by {model.describe()}")
        size = options.batch_size or answering.batch_size()
        progress = RowsProgress(len(texts), description="generate", enabled=is_main())
        with progress, decoding(chunks, vocab_size=model.tokenizer.vocab_size) as decoder:
            parts = answers(decoder, prompts, answering, batch_size=size, on_batch=progress.advance)
            found = [answer for part in parts for answer in part]
        together(lambda: _tell(texts, found, options.out) if is_main() else None)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: objects with `context` or `prompt` in a .jsonl, else a prompt in each line.

    Raises:
        DataError: no such file, an empty one, not UTF-8, or a line that holds no prompt.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DataError(f"{path} has {path.stat().st_size} bytes, at most {_MOST_BYTES} are read: split it")
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark is no part of the first prompt
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read prompts from {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    lines = text.removesuffix("\n").split("\n") if text else []
    if not lines:
        raise DataError(f"{path} is empty: put a prompt in each line")
    is_json = path.suffix == ".jsonl"
    prompts = [_from_json(line) if is_json else line.removesuffix("\r") for line in lines]
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            wanted = "is no object with a text under context or prompt" if is_json else "is empty: put a prompt there"
            raise DataError(f"{path}: line {number} {wanted}")
    return prompts


def _from_json(line: str) -> str:
    """The prompt of a line, empty where there is none."""
    try:
        value: Any = parse_json(line)
    except (json.JSONDecodeError, NotStrictJson, RecursionError):
        return ""
    texts = [value[name] for name in _FIELDS if name in value] if isinstance(value, dict) else []
    return texts[0] if len(texts) == 1 and isinstance(texts[0], str) else ""


def _tell(texts: Sequence[str], found: Sequence[Answer], out: Path | None) -> None:
    if out is not None:
        lines = [
            json.dumps({"prompt": text, **answer}, ensure_ascii=False) + "\n"
            for text, answer in zip(texts, found, strict=True)
        ]
        write_text(out, "".join(lines))
        say(f"written: {out}")
        return
    for text, answer in zip(texts, found, strict=True):
        print(f"{text}\n  -> {answer['prediction']}\n")

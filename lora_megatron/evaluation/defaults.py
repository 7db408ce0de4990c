# SPDX-License-Identifier: Apache-2.0
"""How the texts of a task are decoded where the user says nothing; free of torch, so that a wrong flag shows at once.

The three data-to-text tasks of the LoRA paper's GPT-2 have its search: ten beams, length penalty 0.8, no 4-gram twice
in the continuation. Its code looks for repetitions in what was generated, not in the prompt, whose slots have to be
named in full. Everything else is greedy.
"""

from __future__ import annotations

from typing import Any

from lora_megatron.evaluation.settings import Decoding

_PAPER = {"beams": 10, "length_penalty": 0.8, "no_repeat_ngram": 4, "no_repeat_prompt": False}
_OF_TASKS: dict[str, dict[str, Any]] = {"e2e": _PAPER, "webnlg": _PAPER, "dart": _PAPER}
_OF_BEAMS = ("length_penalty", "early_stopping")
_OF_SAMPLING = ("temperature", "top_k", "top_p", "seed")


def decoding_of(task: str | None, given: dict[str, Any]) -> Decoding:
    """The decoding of a task, changed by `given` (None stands for what was not given).

    Raises:
        ConfigError: values that cannot work, or that belong to another kind of decoding and would change nothing.
    """
    given = {name: value for name, value in given.items() if value is not None}
    values = {**_OF_TASKS.get(task or "", {}), **given}
    if given.get("sample") and "beams" not in given:
        values.pop("beams", None)
    settings = Decoding(**values)
    for names, kind, remedy in ((_OF_BEAMS, "beams", "--beams 2 or more"), (_OF_SAMPLING, "sampling", "--sample")):
        if idle := [name for name in names if name in given and settings.kind != kind]:
            raise settings.error_of(idle[0], f"says nothing in {settings.kind} decoding: add {remedy}, or leave it out")
    return settings

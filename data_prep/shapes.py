# SPDX-License-Identifier: Apache-2.0
"""The columns that users' own data comes in, named as TRL and Alpaca name them, and the row that a record makes.

| columns                              | context                              | target              |
|--------------------------------------|--------------------------------------|---------------------|
| messages [{role, content}, ..]       | all but the last, by a chat template | the last, assistant |
| prompt, completion                   | the prompt                           | the completion      |
| instruction, output, and maybe input | instruction, an empty line, input    | the output          |
| text                                 | nothing                              | the text            |

A prompt and its completion may be lists of messages too. With a chat template plain ones become a user's message and
the assistant's answer. The first shape in this order whose columns a file has is that of all its records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.chat_template import ChatTemplate
from data_prep.rows import checked_text, list_in, text_in
from lora_megatron.errors import ConfigError

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """needs: the columns that tell it; may_have: more that it reads; texts: record -> (context, target)."""

    needs: tuple[str, ...]
    texts: Callable[[Record, ChatTemplate | None], tuple[str, str]]
    may_have: tuple[str, ...] = ()


def conversation(record: Record, template: ChatTemplate | None) -> tuple[str, str]:
    """Of `messages`. Raises ValueError, or ConfigError without a template."""
    return _by_template(_messages(record, "messages"), record, "messages", template)


def prompted(record: Record, template: ChatTemplate | None, *, prompt: str, completion: str) -> tuple[str, str]:
    """Of a prompt and its completion, both text or both messages. Raises as `conversation` does."""
    if isinstance(record.get(prompt), list) or isinstance(record.get(completion), list):
        messages = _messages(record, prompt) + _messages(record, completion)
        if len(record[completion]) != 1:
            raise ValueError(f"{completion} has {len(record[completion])} messages, expected the assistant's one")
        return _by_template(messages, record, f"{prompt} and {completion}", template)
    return _turn(text_in(record, prompt), text_in(record, completion), template)


def instructed(record: Record, template: ChatTemplate | None) -> tuple[str, str]:
    """Of an instruction, its input if there is one, and the output. Raises ValueError."""
    instruction = text_in(record, "instruction")
    given = record.get("input")
    given = "" if given is None else checked_text(given, "input", may_be_empty=True)
    return _turn(f"{instruction}\n\n{given}" if given.strip() else instruction, text_in(record, "output"), template)


def continued(record: Record, template: ChatTemplate | None) -> tuple[str, str]:
    """Of a text alone. Raises ValueError, or ConfigError with a template."""
    if template is not None:
        raise ConfigError("the column text has no turns that a chat template could render: leave --chat-template out")
    return "", text_in(record, "text")


def prompt_and_completion(prompt: str = "prompt", completion: str = "completion") -> Shape:
    """That shape, with columns of any name."""
    return Shape(
        (prompt, completion),
        lambda record, template: prompted(record, template, prompt=prompt, completion=completion),
    )


SHAPES = (
    Shape(("messages",), conversation, ("tools",)),
    prompt_and_completion(),
    Shape(("instruction", "output"), instructed, ("input",)),
    Shape(("text",), continued),
)


def shape_of(columns: Sequence[str]) -> Shape | None:
    """The first shape whose columns are among `columns`, or None."""
    return next((shape for shape in SHAPES if set(shape.needs) <= set(columns)), None)


def _turn(prompt: str, completion: str, template: ChatTemplate | None) -> tuple[str, str]:
    if template is None:
        return prompt, completion
    return template.split([{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}])


def _messages(record: Record, column: str) -> list[Record]:
    messages = list_in(record, column)
    for number, message in enumerate(messages, start=1):
        what = f"message {number} of {column}"
        if not isinstance(message, dict):
            raise ValueError(f"{what} is no object with role and content")
        checked_text(message.get("role"), f"the role of {what}")
        if message.get("content") is not None or not message.get("tool_calls"):
            checked_text(message.get("content"), f"the content of {what}", may_be_empty=True)
    return messages


def _by_template(messages: list[Record], record: Record, what: str, template: ChatTemplate | None) -> tuple[str, str]:
    if template is None:
        raise ConfigError(f"{what}: to render messages, give --chat-template the folder of a tokenizer that has one")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(f"{what} must hold two messages or more and end with one of the assistant's")
    text = messages[-1].get("content")
    if not messages[-1].get("tool_calls") and not (text or "").strip():
        raise ValueError(f"the last message of {what} is empty")
    tools = record.get("tools") or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("tools is no list of objects")
    return template.split(messages, tools=tools)

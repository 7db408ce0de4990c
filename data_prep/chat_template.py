# SPDX-License-Identifier: Apache-2.0
"""A tokenizer's chat template: messages to the text that its model was trained on, cut into context and target.

    rendered  <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    context   <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
    target    Hello

The last message is the target, all before it the context, which ends where the model would begin to answer. Training
adds the end token to a target, so the template's own, and the white space behind it, are taken off. A template is a
program by whoever made the tokenizer: it runs in Jinja's sandbox and sees the messages, the tools and the names of the
special tokens, as in transformers. It has no clock: a date has to be given, so that the same data gives the same bytes.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data_prep.rows import checked_text
from lora_megatron.data.manifest import load_json_object
from lora_megatron.data.tokenizer import Tokenizer, load_tokenizer
from lora_megatron.errors import ConfigError, DataError

Message = Mapping[str, Any]
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MOST_TEMPLATE_BYTES = 2**20
_FAILURES = (jinja2.TemplateError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, ValueError)
"""What a template may raise over messages that it was not made for."""


class ChatTemplate:
    """The chat template of a tokenizer's folder: chat_template.jinja, or `chat_template` in tokenizer_config.json.

    date: what a template is told that asks for today's.

    Raises DataError where there is no template, no tokenizer, or the template is no Jinja.
    """

    def __init__(self, folder: Path, *, date: datetime.date | None = None) -> None:
        self.tokenizer: Tokenizer = load_tokenizer(str(folder))
        if not (folder / "tokenizer.json").exists():
            raise DataError(f"{folder} has no tokenizer.json, which says what a template's special tokens are")
        source, self._path, self._tokens = _read(folder)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: self._strftime(date, form)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            line = f":{error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise DataError(f"{self._path}: the chat template{line} is no Jinja ({_first_line(error)})") from error

    def render(self, messages: Sequence[Message], *, tools: list[Any] | None, add_generation_prompt: bool) -> str:
        """The text of `messages`. Raises ValueError when the template refuses or fails."""
        # A key without a value is as good as none, and templates handle the latter.
        plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        names = {"documents": None, "add_generation_prompt": add_generation_prompt, **self._tokens}
        try:
            return self._template.render(messages=plain, tools=tools, **names)
        except ConfigError:
            raise
        except _FAILURES as error:
            raise ValueError(f"the chat template fails: {_first_line(error)}") from error

    def split(self, messages: Sequence[Message], *, tools: list[Any] | None = None) -> tuple[str, str]:
        """(context, target), the target being the last message.

        Raises ValueError when a message spells a special token, the template fails, or the rendered context is not how
        the whole begins.
        """
        for text in _texts([messages, tools]):
            checked_text(text, "a part of a message", may_be_empty=True)
            if (token := self.tokenizer.special_in(text)) is not None:
                raise ValueError(f"a message spells the special token {token!r}: it would be taken for the template's")
        context = self.render(messages[:-1], tools=tools, add_generation_prompt=True)
        whole = self.render(messages, tools=tools, add_generation_prompt=False)
        if not whole.startswith(context):
            at = next((i for i, (a, b) in enumerate(zip(context, whole, strict=False)) if a != b), len(whole))
            raise ValueError(
                f"the chat template writes the context in one way before an answer ({context[at : at + 30]!r}) and in "
                f"another within the whole ({whole[at : at + 30]!r}): no target can be cut off; "
                "render it yourself to prompt and completion"
            )
        target = self._without_end(whole[len(context) :])
        if not target.strip():
            raise ValueError("the chat template leaves nothing of the last message; does it know the role 'assistant'?")
        return context, target

    def _without_end(self, target: str) -> str:
        end = self._tokens.get("eos_token")
        return target.rstrip().removesuffix(end) if end and target.rstrip().endswith(end) else target

    def _strftime(self, date: datetime.date | None, form: str) -> str:
        if date is None:
            raise ConfigError(f"{self._path}: the chat template asks for today's date: give --date YYYY-MM-DD")
        return datetime.datetime.combine(date, datetime.time()).strftime(form)


def _read(folder: Path) -> tuple[str, Path, dict[str, str]]:
    """The template's source, its file, and the special tokens by their names in templates."""
    config_path, map_path, template_path = (
        folder / name for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    )
    config = load_json_object(config_path, "tokenizer settings") if config_path.exists() else {}
    known = {**(load_json_object(map_path, "special tokens") if map_path.exists() else {}), **config}
    texts = {name: known[name]["content"] if isinstance(known.get(name), dict) else known.get(name) for name in _TOKENS}
    tokens = {name: text for name, text in texts.items() if isinstance(text, str)}
    if template_path.exists():
        return _read_source(template_path), template_path, tokens
    source = config.get("chat_template")
    if isinstance(source, list):  # several with names
        named = {item["name"]: item.get("template") for item in source if isinstance(item, dict) and "name" in item}
        source = named.get("default")
    if not isinstance(source, str):
        raise DataError(
            f"{folder} has no chat template: neither chat_template.jinja nor 'chat_template' in tokenizer_config.json; "
            "give --chat-template the folder of a chat model's tokenizer"
        )
    return source, config_path, tokens


def _read_source(path: Path) -> str:
    try:
        with open(path, "rb") as stream:
            content = stream.read(_MOST_TEMPLATE_BYTES + 1)
        if len(content) > _MOST_TEMPLATE_BYTES:
            raise DataError(f"{path} is larger than {_MOST_TEMPLATE_BYTES} bytes: no chat template")
        return content.decode("utf-8").replace("\r\n", "\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; expected a chat template") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8; expected a chat template") from error


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}`, with which some templates mark what an assistant says: just its content."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _texts(value: Any) -> list[str]:
    """Every text in messages and tools, keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for part in pair for text in _texts(part)]
    return [text for item in value for text in _texts(item)] if isinstance(value, list | tuple) else []


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]

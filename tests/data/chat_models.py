# SPDX-License-Identifier: Apache-2.0
"""A small tokenizer with special tokens in a folder, and chat templates of the kinds that models come with."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

START, END = "<|im_start|>", "<|im_end|>"

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA2 = """\
{{ bos_token }}{% for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}
    {%- else %}{% generation %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endgeneration %}{% endif %}
{%- endfor %}
"""
TOOLS = """\
{%- if tools %}{{ '<|im_start|>tools\\n' }}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{{ '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(count=0) %}
{%- for message in messages %}
    {%- if message.content is not defined %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
{{ '<|im_start|>' ~ message.role ~ ' ' ~ ns.count ~ '\\n' ~ message.content ~ '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{ '<|im_start|>assistant ' ~ (ns.count + 1) ~ '\\n' }}
{%- endif %}
"""
DATED = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\\n' }}" + CHATML
INCONSISTENT = CHATML.replace("assistant\\n'", "assistant\\n<think>\\n'")


def write_tokenizer(folder: Path, template: str | None, *, in_config: bool = True) -> Path:
    """A tokenizer of the 256 bytes, a bos, an eos and <|im_start|>, with `template` in its settings or beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", START, END)])
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": {"content": END}}
    config["eos_token"] = {"__type": "AddedToken", "content": END, "special": True}
    if template is not None and in_config:
        config["chat_template"] = template
    elif template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder

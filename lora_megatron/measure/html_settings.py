# SPDX-License-Identifier: Apache-2.0
"""What a run was set to and where it ran, as cards of keys and values; secrets are redacted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lora_megatron.config import Config
from lora_megatron.measure.html_page import Html, definitions, paragraph
from lora_megatron.measure.redaction import redact
from lora_megatron.measure.units import show_bytes

_NAMES = {"": "system", "git": "code"}


def configuration_cards(config: Mapping[str, Any]) -> list[Html]:
    """A card a section; values that differ from their defaults stand out."""
    if not config:
        return [paragraph("config.yaml is not there.")]
    defaults = Config().model_dump(mode="json")
    cards = []
    for name, section in redact(dict(config)).items():
        values = section if isinstance(section, dict) else {"": section}
        usual = defaults.get(name) or {}
        # What the model is, its base or preset says: every value would stand out.
        marked = frozenset(key for key in values if name != "model" and key in usual and values[key] != usual[key])
        cards.append(definitions(str(name), {str(key): _text(value) for key, value in values.items()}, marked=marked))
    return [_columns(cards), paragraph("Values that differ from their defaults are bold.", kind="note")]


def environment_cards(environment: Mapping[str, Any]) -> list[Html]:
    """A card for what stands at the top, and one for each group."""
    if not environment:
        return [paragraph("environment.json is not there.")]
    groups: dict[str, dict[str, str]] = {"": {}}
    for name, value in redact(dict(environment)).items():
        if isinstance(value, dict):
            groups[name] = {key: _environment_text(key, item, name) for key, item in value.items()}
        else:
            groups[""][name] = _environment_text(name, value, "")
    return [_columns([definitions(_NAMES.get(name, name), pairs) for name, pairs in groups.items() if pairs])]


def _environment_text(key: str, value: Any, group: str) -> str:
    if value is None and group == "packages":
        return "not installed"
    if key == "gpus" and isinstance(value, list):
        return ", ".join(_times(value))
    return show_bytes(value) if key.endswith("_bytes") and isinstance(value, int | float) else _text(value)


def _times(gpus: list[Any]) -> list[str]:
    """`8 x NVIDIA H100 (79.6 GiB)` for eight of them."""
    names = [f"{gpu.get('name')} ({show_bytes(gpu.get('memory_bytes'))})" for gpu in gpus if isinstance(gpu, dict)]
    return [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]


def layout_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """(axis, size) of the layout, the number of ranks at the end."""
    layout = summary.get("layout") or {}
    rows = [[f"{axis} parallel".replace("_", " "), _text(size)] for axis, size in layout.items()]
    return [*rows, ["ranks", _text(summary.get("world_size"))]]


def _columns(cards: list[Html]) -> Html:
    return Html('<div class="cards">\n' + "\n".join(cards) + "\n</div>")


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value) or "-"
    return json.dumps(value)

# SPDX-License-Identifier: Apache-2.0
"""Read a configuration: defaults < YAML file < overlays and `section.key=value`, in the order given.

An unknown key is an error that names the nearest valid one.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lora_megatron.config.sections import Config
from lora_megatron.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `overrides`: `section.key=value` (values are YAML), or the path of another YAML file
    whose keys win over those before it, such as a layout of `launch/configs/layouts`.

    Raises:
        ConfigError: the file is missing or not YAML, or a key or value is not valid; the message names the nearest
            valid key.
    """
    tree = _read_file(path)
    for override in overrides:
        if "=" not in override and override.endswith((".yaml", ".yml")):
            _lay_over(tree, _read_file(override))
        else:
            _apply_override(tree, override)
    return parse_config(tree)


def _read_file(path: str | Path) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read configuration {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        tree = _read_yaml(text)
    except _YAML_ERRORS as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections (model:, data:, ...), not a {type(tree).__name__}")
    return tree


def _lay_over(tree: dict[str, Any], overlay: dict[str, Any]) -> None:
    """Key by key within a section; the value of a key is replaced as a whole."""
    for section, keys in overlay.items():
        if isinstance(keys, dict) and isinstance(tree.get(section), dict):
            tree[section] = {**tree[section], **keys}
        elif keys is not None:
            tree[section] = keys


_YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)  # impossible dates and deep nesting raise the last two


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML without tags that construct objects, and without the same key twice: the first would be lost in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key!r} stands there twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


def _read_yaml(text: str) -> Any:
    loader = _UniqueKeyLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    names = key.strip().split(".")
    if not equals or len(names) < 2 or not all(names):
        raise ConfigError(f"override {override!r} is not of the form section.key=value, e.g. train.steps=100")
    node = tree
    for name in names[:-1]:
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {name} is not a section")
    try:
        node[names[-1]] = _read_yaml(value)
    except _YAML_ERRORS:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None


def parse_config(tree: dict[str, Any]) -> Config:
    """Validate a tree of sections; see `load_config`."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error.errors()[0])) from None


def _explain(problem: Any) -> str:
    """One line for pydantic's first complaint, in this project's words."""
    where = [str(part) for part in problem["loc"] if part != "[key]"]
    name = ".".join(where)
    if problem["type"] == "extra_forbidden":
        valid = _valid_keys(where[:-1])
        nearest = difflib.get_close_matches(where[-1], valid, n=1, cutoff=0.0)
        prefix = ".".join([*where[:-1], ""])
        return f"unknown key {name}: did you mean {prefix}{nearest[0]}? (valid: {', '.join(valid)})"
    if problem["type"] == "model_type":
        return f"{name} = {_short.repr(problem['input'])} is not a section: it needs {', '.join(_valid_keys(where))}"
    reason = problem["msg"].removeprefix("Value error, ")
    return f"{name} = {_short.repr(problem['input'])} is not valid: {reason[0].lower()}{reason[1:]}"


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlevel = 2


def _valid_keys(section: Sequence[str]) -> list[str]:
    model: type[BaseModel] = Config
    for name in section:
        model = model.model_fields[name].annotation  # type: ignore[assignment]  # a section's annotation is its class
    return list(model.model_fields)

# SPDX-License-Identifier: Apache-2.0
"""PEFT's adapter_config.json, read strictly: what it says of ranks, scales and targets, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_megatron.checkpoint.adapter import CONFIG
from lora_megatron.checkpoint.adapter_reader import is_usable_alpha
from lora_megatron.errors import CheckpointError
from lora_megatron.layers.lora import scaling
from lora_megatron.strict_json import load_json_object

# Keys that change what an adapter computes, in ways this stack has not, with the values that do not.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    **dict.fromkeys(
        (
            *("use_dora", "lora_bias", "use_qalora", "use_bdlora", "modules_to_save", "layer_replication"),
            *("trainable_token_indices", "target_parameters", "alora_invocation_tokens", "arrow_config"),
            *("kasa_config", "monteclora_config", "velora_config"),
        ),
        (None, False, [], {}),
    ),
}
# Other initialisations (pissa, olora, corda, loftq, lora_ga) take something out of the base's weights when PEFT loads.
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
_PATTERN = re.compile(r"\^?[\w.]+")


class PeftConfig:
    """The LoRA configuration in folder `adapter`.

    Raises:
        CheckpointError: no such file, not LoRA, or with features that are not supported.
    """

    def __init__(self, adapter: Path) -> None:
        self.path = adapter / CONFIG
        self.values = load_json_object(self.path, "a PEFT adapter's configuration", CheckpointError)
        if self.values.get("peft_type") != "LORA":
            raise CheckpointError(f"{self.path}: peft_type {self.values.get('peft_type')!r}; only LORA is supported")
        for key, harmless in _HARMLESS.items():
            if self.values.get(key) not in harmless:
                raise CheckpointError(f"{self.path}: {key} = {self.values[key]!r} is not supported; only plain LoRA is")
        start = self.values.get("init_lora_weights")
        if start not in _PLAIN_STARTS:
            raise CheckpointError(
                f"{self.path}: init_lora_weights = {start!r} changes the base's weights too: save the adapter with "
                "PEFT's path_initial_model_for_weight_conversion, which makes plain LoRA of it"
            )
        self.stabilised = self.values.get("use_rslora") or False
        if not isinstance(self.stabilised, bool):
            raise CheckpointError(f"{self.path}: use_rslora = {self.stabilised!r} must be true or false")

    def rank(self, module: str) -> int:
        """r of a module, by rank_pattern."""
        rank = self._by_pattern("rank_pattern", "r", module)
        if type(rank) is not int or rank < 1:
            raise CheckpointError(f"{self.path}: the rank of {module} is {rank!r}; it must be a whole number above 0")
        return rank

    def scale(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) with use_rslora, of a module."""
        alpha = self._by_pattern("alpha_pattern", "lora_alpha", module)
        if not is_usable_alpha(alpha):
            raise CheckpointError(f"{self.path}: the alpha of {module} is {alpha!r}; it must be a number above 0")
        return scaling(float(alpha), self.rank(module), rank_stabilised=self.stabilised)

    def _by_pattern(self, patterns: str, default: str, module: str) -> Any:
        """PEFT's rule: the first pattern that is the module's name or an ending of it, else the general value."""
        table = self.values.get(patterns) or {}
        if not isinstance(table, Mapping):
            raise CheckpointError(f"{self.path}: {patterns} must map module names to numbers")
        for pattern, value in table.items():
            if not _PATTERN.fullmatch(pattern):
                raise CheckpointError(
                    f"{self.path}: {patterns} names {pattern!r}; only plain module names are supported"
                )
            if module == pattern.removeprefix("^") or (pattern[0] != "^" and module.endswith(f".{pattern}")):
                return value
        return self.values.get(default)

    def check_targets(self, adapted: set[str], every: set[str]) -> None:
        """Raise CheckpointError unless the targets name exactly the modules that have tensors.

        `every` are the model's linear layers. Targets given as an expression are not evaluated: the tensors decide.
        """
        targets = self.values.get("target_modules")
        if isinstance(targets, str):
            return
        if not isinstance(targets, list) or not targets or not all(isinstance(t, str) for t in targets):
            raise CheckpointError(f"{self.path}: target_modules = {targets!r} must be a list of module names")
        excluded = self.values.get("exclude_modules") or []
        layers = self.values.get("layers_to_transform")
        named = {m for m in every if _names(targets, m) and not _names(excluded, m) and _in_layers(layers, m)}
        if missing := sorted(named - adapted):
            raise CheckpointError(f"{self.path}: {missing[0]} is a target and has no tensors in the adapter")
        if extra := sorted(adapted - named):
            raise CheckpointError(f"{self.path}: {extra[0]} has tensors in the adapter and is no target")


def _names(endings: Any, module: str) -> bool:
    names = endings if isinstance(endings, list) else [endings]
    return any(module == name or module.endswith(f".{name}") for name in names)


def _in_layers(layers: Any, module: str) -> bool:
    if layers is None or layers == []:
        return True
    index = next(int(part) for part in module.split(".") if part.isdecimal())
    return index in (layers if isinstance(layers, list) else [layers])

# SPDX-License-Identifier: Apache-2.0
"""From a configuration and an adapter to a model that decodes, in its world; for `generate` and `evaluate`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from lora_megatron.checkpoint.adapter import CONFIG, TENSORS, load_adapter
from lora_megatron.checkpoint.adapter_reader import AdapterReader
from lora_megatron.checkpoint.base import Base
from lora_megatron.checkpoint.folder import MANIFEST, read_manifest
from lora_megatron.commands.base import resolve_base, tokenizer_of
from lora_megatron.config import Config, MethodSection
from lora_megatron.data.tokenizer import Tokenizer, load_tokenizer
from lora_megatron.errors import CheckpointError
from lora_megatron.methods.choose import choose_method
from lora_megatron.methods.lora import Lora
from lora_megatron.methods.method import Method
from lora_megatron.model.build import build
from lora_megatron.model.checks import check_decoding, layout_of, options_of
from lora_megatron.model.recomputation import NOTHING_RECOMPUTED
from lora_megatron.parallel import groups
from lora_megatron.parallel.agree import is_main, require_equal, together
from lora_megatron.parallel.groups import Ranks
from lora_megatron.parallel.heartbeat import beat
from lora_megatron.parallel.stopping import stop_if_asked

ADVICE = {"lower": "lower --batch-size", "again": "start the same command again"}
"""For `joined`."""


@dataclass(frozen=True)
class DecodingModel:
    """What a configuration and an adapter come to, before anything is built."""

    config: Config
    tokenizer: Tokenizer
    base: Base
    method: Method
    adapter: Path | None
    adapter_hash: str | None
    """SHA-256 of its tensors."""

    @property
    def positions(self) -> int:
        """Longest text."""
        return self.base.shape.max_position_embeddings

    def describe(self) -> str:
        """For a person."""
        with_adapter = f"with the adapter {self.adapter}" if self.adapter else "alone (no --adapter)"
        return f"the base {self.config.base.weights} {with_adapter}"

    def build(self) -> tuple[list[GPTModel], Ranks]:
        """This rank's part of it, loaded, and where it stands; collective."""
        section = self.config.parallel
        layout = layout_of(self.config)
        ranks = groups.build_mesh(layout, seed=self.config.train.seed, timeout_minutes=section.timeout_minutes)
        beat("load")
        # Attention over a cache is torch's whatever the configuration says: FlashAttention 4 need not be here.
        options = replace(
            options_of(self.config), dropout=0.0, attention="torch", tp_comm_overlap=False, **NOTHING_RECOMPUTED
        )
        chunks = build(self.base.shape, self.method, layout, options)
        together(lambda: self.base.load(chunks))
        if self.adapter is not None:
            load_adapter(self.adapter, chunks, self.method, self.base.shape, base_fingerprint=self.base.fingerprint)
        stop_if_asked()
        return chunks, ranks


def plan_model(config: Config, adapter: Path | None) -> DecodingModel:
    """What is to be built; the same on all ranks; collective.

    Raises:
        UserError: the base, the tokenizer or the adapter is missing, damaged, or does not belong to the others.
    """
    planned = together(lambda: _plan(config, adapter))
    require_equal("the tokenizer", planned.tokenizer.fingerprint)
    require_equal("the base model", planned.base.fingerprint)
    require_equal("the adapter", planned.adapter_hash or "none")
    stop_if_asked()
    return planned


def _plan(config: Config, adapter: Path | None) -> DecodingModel:
    tokenizer = load_tokenizer(tokenizer_of(config))
    base = resolve_base(config, tokenizer)
    method: Method = Lora({}, 1.0)  # nothing adapted, all frozen
    adapter_hash = None
    if adapter is not None:
        _require_adapter(adapter)
        with AdapterReader(adapter, base.shape, base_fingerprint=base.fingerprint) as reader:
            method = reader.method or _method_named(str(reader.facts.get("method")), config, base)
        adapter_hash = read_manifest(adapter, verify=False)["files"][TENSORS]["sha256"]
    check_decoding(config, base.shape, method, dist.get_world_size())
    return DecodingModel(config, tokenizer, base, method, adapter, adapter_hash)


def _method_named(name: str, config: Config, base: Base) -> Method:
    """One that is no LoRA: its settings, if it has any, are those of the configuration."""
    section = config.method if config.method.name == name else MethodSection(name=name)
    return choose_method(section, num_layers=base.shape.num_layers)


def _require_adapter(folder: Path) -> None:
    if (folder / MANIFEST).is_file():
        return
    remedy = "give the folder `adapter` of a run"
    if (folder / "adapter" / MANIFEST).is_file():
        remedy = f"did you mean {folder / 'adapter'}?"
    elif (folder / "model").is_dir():
        remedy = f"it is a run that trained the whole model: give base.weights={folder / 'model'} and no adapter"
    elif (folder / CONFIG).is_file():
        remedy = "it looks like one of PEFT's: `lora-megatron import` makes one of this project of it"
    raise CheckpointError(f"--adapter {folder} is not the folder of an adapter: {remedy}")


def say(text: str) -> None:
    """A line on stderr, of rank 0."""
    if is_main():
        print(text, file=sys.stderr, flush=True)

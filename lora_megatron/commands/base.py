# SPDX-License-Identifier: Apache-2.0
"""Which base a configuration names, and which tokenizer goes with it."""

from __future__ import annotations

from pathlib import Path

from lora_megatron.checkpoint.base import CONFIG, Base, random_base, read_tokenizer_fingerprint
from lora_megatron.config import Config
from lora_megatron.data.tokenizer import Tokenizer, has_tokenizer
from lora_megatron.errors import CheckpointError, ConfigError
from lora_megatron.huggingface.base import open_base
from lora_megatron.huggingface.checkpoint import is_checkpoint
from lora_megatron.model.presets import resolve_shape

RANDOM = "random"


def tokenizer_of(config: Config) -> str:
    """`data.tokenizer`; where it is not given, that of a Hugging Face base, and bytes for any other.

    Raises:
        ConfigError: it is not given and the Hugging Face base has none.
    """
    if config.data.tokenizer is not None:
        return config.data.tokenizer
    weights = config.base.weights
    if weights == RANDOM or not is_checkpoint(Path(weights)):
        return "bytes"
    if not has_tokenizer(Path(weights)):
        raise ConfigError(
            f"base.weights = {weights} has no tokenizer.json: give data.tokenizer the folder of the base's tokenizer"
        )
    return weights


def resolve_base(config: Config, tokenizer: Tokenizer) -> Base:
    """The base that `config` names, in agreement with its model section and tokenizer.

    Raises:
        CheckpointError: no such model, or another than the model section describes.
        ConfigError: the tokenizer is not the base's.
    """
    if config.base.weights == RANDOM:
        shape = resolve_shape(config.model, tokenizer_vocab_size=tokenizer.vocab_size)
        return random_base(shape, seed=config.base.seed)
    base = stored_base(config)
    folder = Path(config.base.weights)
    check_shape(config, base, vocab_size=tokenizer.vocab_size)
    if base.shape.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"base.weights = {config.base.weights} has a vocabulary of {base.shape.vocab_size}, the tokenizer "
            f"{config.data.tokenizer} needs {tokenizer.vocab_size}: give data.tokenizer the one the base was trained on"
        )
    if not is_checkpoint(folder) and read_tokenizer_fingerprint(folder) not in (None, tokenizer.fingerprint):
        raise ConfigError(
            f"base.weights = {config.base.weights} was trained with another tokenizer than data.tokenizer = "
            f"{config.data.tokenizer}: give data.tokenizer the one its {CONFIG} names"
        )
    return base


def stored_base(config: Config) -> Base:
    """The model in the folder `base.weights`, whatever the model section and the tokenizer say.

    Raises:
        CheckpointError: no such model.
    """
    folder = Path(config.base.weights)
    if not folder.is_dir():
        raise CheckpointError(f"base.weights = {folder} is neither {RANDOM} nor a folder")
    if not (folder / CONFIG).is_file() and (folder / "model" / CONFIG).is_file():
        raise CheckpointError(f"base.weights = {folder} is the folder of a run: did you mean {folder / 'model'}?")
    return open_base(folder)


def check_shape(config: Config, base: Base, *, vocab_size: int) -> None:
    """A stored model knows its shape; what the model section says of it must be true. Raises CheckpointError.

    vocab_size: of the vocabulary, where the section names a preset and leaves it open.
    """
    said = config.model.model_dump(exclude={"preset"}, exclude_none=True)
    if config.model.preset is not None:
        said = resolve_shape(config.model, tokenizer_vocab_size=vocab_size).to_dict()
    stored = base.shape.to_dict()
    if wrong := [name for name, value in said.items() if stored[name] != value]:
        details = ", ".join(f"{name} is {stored[name]}, not {said[name]}" for name in wrong)
        raise CheckpointError(f"base.weights = {config.base.weights}: the stored model is another one: {details}")

# SPDX-License-Identifier: Apache-2.0
"""Can `train.attention = fa4` be had? FlashAttention 4's kernels are made for bf16, certain GPUs and head sizes.

What no machine could do is refused where a run is planned too; what this one lacks, only where it is to run.
"""

from __future__ import annotations

import torch

from lora_megatron.config import Config
from lora_megatron.errors import ConfigError
from lora_megatron.layers.attention import FLASH_ATTENTION_4, flash_attention_4
from lora_megatron.model.shape import ModelShape

OLDEST_GPU = (9, 0)
"""Compute capability: Hopper's."""
_MULTIPLE = 8  # of a head's size: 16 bytes, which is what its kernels load at a time
_WIDEST, _WIDEST_BUT_ONE = 256, 128  # between the two Hopper alone has kernels
_OTHERWISE = "train.attention=torch"


def check_attention(config: Config, shape: ModelShape) -> None:
    """Raise ConfigError where no machine has the kernels that `train.attention` asks for."""
    if config.train.attention != FLASH_ATTENTION_4:
        return
    if config.train.precision != "bf16":
        raise ConfigError(
            f"train.attention = fa4 with train.precision = {config.train.precision}: FlashAttention 4 computes in "
            f"bf16; set train.precision=bf16, or {_OTHERWISE}"
        )
    if config.data.packing:
        raise ConfigError(
            "train.attention = fa4 with data.packing = true: packed rows have masks, with which all attention would be "
            f"torch's; set data.packing=false, or {_OTHERWISE}"
        )
    if shape.head_dim % _MULTIPLE or shape.head_dim > _WIDEST:
        raise ConfigError(
            f"train.attention = fa4 with heads of model.head_dim = {shape.head_dim}: FlashAttention 4 takes multiples "
            f"of {_MULTIPLE} up to {_WIDEST}; set {_OTHERWISE}"
        )


def check_attention_here(config: Config, shape: ModelShape) -> None:
    """Raise ConfigError where this machine lacks the kernels that `train.attention` asks for; imports the package."""
    if config.train.attention != FLASH_ATTENTION_4:
        return
    if not torch.cuda.is_available():
        raise ConfigError(f"train.attention = fa4: this machine has no CUDA device; set {_OTHERWISE}")
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_GPU:
        raise ConfigError(
            f"train.attention = fa4: this GPU has compute capability {_shown(capability)}, and FlashAttention 4 needs "
            f"{_shown(OLDEST_GPU)} (Hopper) or newer; set {_OTHERWISE}"
        )
    if _WIDEST_BUT_ONE < shape.head_dim < _WIDEST and capability[0] != OLDEST_GPU[0]:
        raise ConfigError(
            f"train.attention = fa4 with heads of model.head_dim = {shape.head_dim}: on a GPU of compute capability "
            f"{_shown(capability)} FlashAttention 4 takes up to {_WIDEST_BUT_ONE}, or {_WIDEST}; set {_OTHERWISE}"
        )
    try:
        flash_attention_4()
    except ImportError as error:
        raise ConfigError(
            f"train.attention = fa4 needs the package flash-attn-4 ({_line(error)}): pip install 'flash-attn-4', or "
            f"set {_OTHERWISE}"
        ) from error
    except Exception as error:  # whatever a package of others raises is what is wrong with it
        raise ConfigError(
            f"train.attention = fa4: the import of flash-attn-4 fails ({type(error).__name__}: {_line(error)}); "
            f"install it anew, or set {_OTHERWISE}"
        ) from error


def _shown(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

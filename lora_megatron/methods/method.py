# SPDX-License-Identifier: Apache-2.0
"""The protocol every method answers, and the table of methods."""

from __future__ import annotations

from typing import Protocol

from lora_megatron.layers.lora import Adapter


class Method(Protocol):
    """A way to adapt a model, independent of layout and training loop.

    Names are global: `decoder.layers.17.self_attention.linear_qkv.weight` is the same parameter under every layout.
    """

    @property
    def name(self) -> str:
        """What `method.name` calls it."""
        ...

    @property
    def trains_base(self) -> bool:
        """Whether the result is a whole model (saved as one) rather than a small set of weights beside the base."""
        ...

    def adapters(self, layer: int, projection: str) -> tuple[Adapter, ...]:
        """The adapters on `projection` (q, k, v, o, fc1, gate, up or fc2) of global layer `layer`; often none."""
        ...

    def is_trainable(self, name: str) -> bool:
        """Whether the parameter of that global name gets gradients."""
        ...

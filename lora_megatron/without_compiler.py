# SPDX-License-Identifier: Apache-2.0
"""Spare a machine without a GPU the import of torch's compiler, 2 to 3 of the 7 seconds until a command does something.

megatron-core marks its fused functions for the compiler while it is imported, which loads all of it. On a CPU none of
them is ever called (`model.build` turns the fusions off), so megatron-core is told, by its own switch, to leave them
as they are: as soon as the module with the switch has been loaded, and before any that asks for it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_SWITCH = "megatron.core.jit"


def install() -> None:
    """To be called before megatron-core is imported; imports nothing itself."""
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _SWITCH:
            return None
        sys.meta_path.remove(self)  # its work is done, and whoever looks next must find the module itself
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        import torch

        if not torch.cuda.is_available():
            module.disable_jit_fuser()

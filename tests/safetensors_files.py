# SPDX-License-Identifier: Apache-2.0
"""Right and wrong safetensors files, and the official library's opinion of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lora_megatron.errors import CheckpointError
from lora_megatron.strict_safetensors import SafetensorsFile, SafetensorsWriter

Tree = dict[str, Any]


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bytes, so NaN payloads too; compare with `same`."""
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (torch.Size(shape).numel() * dtype.itemsize,))
    return data.to(torch.uint8).view(dtype).view(shape)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Our writer's file, as bytes too."""
    with SafetensorsWriter(path, [(name, t.dtype, t.shape) for name, t in tensors.items()], metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return path.read_bytes()


def put(path: Path, header: Tree | bytes | str, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file with this header, right or wrong."""
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text if isinstance(text, bytes) else text.encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def check(path: Path) -> bool:
    """Whether we read `path`, and then exactly as the official library does; what we do not is a CheckpointError."""
    try:
        with SafetensorsFile(path) as file:
            ours = {name: file.tensor(name)[:] for name in file.entries}
            metadata = file.metadata
    except CheckpointError:
        return False
    theirs = load_file(path)
    assert set(ours) == set(theirs)
    assert all(same(ours[name], theirs[name]) for name in ours)
    with safe_open(path, framework="pt") as handle:
        assert (handle.metadata() or {}) == metadata
    return True

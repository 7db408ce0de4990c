# SPDX-License-Identifier: Apache-2.0
"""Merge an adapter into a Hugging Face checkpoint: a new folder of the same files, names, layout and types.

    W' = W + (alpha / r) B A        in fp32, rounded to W's type once

One tensor is in memory at a time, with fp32 copies of a block of its rows; what no adapter touches is copied byte for
byte. No GPU, no process group and nothing of the training's layout is needed.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lora_megatron.checkpoint.adapter import CONFIG as ADAPTER_CONFIG
from lora_megatron.checkpoint.adapter_reader import AdapterReader
from lora_megatron.checkpoint.base import base_tensor_names
from lora_megatron.checkpoint.folder import MANIFEST
from lora_megatron.checkpoint.new_folder import new_folder, require_new
from lora_megatron.checkpoint.tensors import all_finite
from lora_megatron.errors import CheckpointError, ConfigError
from lora_megatron.huggingface.checkpoint import INDEX, SINGLE, HfCheckpoint
from lora_megatron.huggingface.layout import Piece, fused_rows, pieces_of, projection_piece
from lora_megatron.layers.qkv import whole
from lora_megatron.measure.console import BytesProgress
from lora_megatron.methods.baselines import BitFit, FineTuneTop
from lora_megatron.methods.method import Method
from lora_megatron.strict_safetensors import SafetensorsFile, SafetensorsWriter

_BLOCK_ELEMENTS = 2**18
_WEIGHTS = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".npz",
    ".ot",
    ".tflite",
}


@dataclass
class Merged:
    """What a merge came to."""

    tensors: int = 0
    changed: int = 0
    """Tensors that hold an adapted projection, or rows stored by the adapter."""
    bytes: int = 0
    largest: float = 0.0
    """The largest |W' - W| / |W| of a projection before rounding, in Frobenius norms."""
    largest_in: str = ""


Edit = Callable[[Tensor], float]
"""Changes its rows of a stored tensor in place; answers |W' - W| / |W| of them."""


def merge(base: Path, adapter: Path, out: Path, *, any_base: bool = False) -> Merged:
    """Write `out`: the checkpoint in `base` with `adapter` (a folder of this project) merged into its weights.

    `any_base` takes an adapter trained on another base, as long as every shape fits. Shows a bar of bytes.

    Raises:
        ConfigError: `out` is inside of `base` or `adapter`, or holds something.
        CheckpointError: the base or adapter is damaged, or they do not belong together, or a merged value is too
            large for the base's type, or `out` cannot be written; nothing of it remains.
    """
    for what, folder in (("base", base), ("adapter", adapter)):
        if out.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"--out {out} is inside of the {what} {folder}, which stays as it is: choose another")
    require_new(out)
    _require_ours(adapter)
    with HfCheckpoint(base) as checkpoint:
        fingerprint = None if any_base else checkpoint.fingerprint()
        with AdapterReader(adapter, checkpoint.shape, base_fingerprint=fingerprint) as reader:
            edits: dict[str, list[Edit]] = {}
            for tensor, edit in _lora_edits(checkpoint, reader) if reader.method else _row_edits(checkpoint, reader):
                edits.setdefault(tensor, []).append(edit)
            with new_folder(out) as temporary:
                result = _write_weights(checkpoint, edits, temporary)
                for path in _other_files(checkpoint):
                    _copy(path, temporary / path.name)
    return result


def _require_ours(adapter: Path) -> None:
    if (adapter / MANIFEST).exists():
        return
    if (adapter / ADAPTER_CONFIG).exists():
        raise CheckpointError(f"{adapter} is a PEFT adapter: convert it first, with lora-megatron import")
    if (adapter / "adapter" / MANIFEST).exists():
        raise CheckpointError(f"{adapter} is not an adapter: give {adapter / 'adapter'}")


def _write_weights(checkpoint: HfCheckpoint, edits: dict[str, list[Edit]], folder: Path) -> Merged:
    result = Merged()
    total = sum(entry.bytes for file in checkpoint.files for entry in file.entries.values())
    with BytesProgress(total, description=f"merge {checkpoint.folder.name}") as progress:
        for file in checkpoint.files:
            with SafetensorsWriter(folder / file.path.name, header=file.header) as writer:
                for name, entry in file.entries.items():
                    _write_tensor(file, name, edits.get(checkpoint.full_name(name), []), writer, result)
                    result.tensors, result.bytes = result.tensors + 1, result.bytes + entry.bytes
                    progress.advance(entry.bytes)
    return result


def _write_tensor(
    file: SafetensorsFile, name: str, edits: list[Edit], writer: SafetensorsWriter, result: Merged
) -> None:
    if not edits:
        writer.write_raw(name, file.tensor(name))
        return
    tensor = file.tensor(name)[:]
    for edit in edits:
        try:
            size = edit(tensor)
        except OverflowError:
            raise CheckpointError(
                f"{file.path}: {name} would hold values that are not finite {tensor.dtype} numbers after the merge: "
                "check the adapter's alpha, or merge into a base of a wider type"
            ) from None
        if size > result.largest:
            result.largest, result.largest_in = size, name
    writer.write(name, tensor)
    result.changed += 1


def _lora_edits(checkpoint: HfCheckpoint, reader: AdapterReader) -> Iterator[tuple[str, Edit]]:
    """(tensor, edit) of every pair."""
    for layer, projection in reader.adapted():
        piece = projection_piece(checkpoint.family, checkpoint.shape, layer, projection, "weight")
        yield piece.tensor, partial(_add_pair, piece, reader, layer, projection)


def _add_pair(piece: Piece, reader: AdapterReader, layer: int, projection: str, tensor: Tensor) -> float:
    """Add scale B A to the piece's rows, a block of them at a time. Raises OverflowError."""
    rows = _rows(piece, tensor)
    groups, height, columns = rows.shape
    scratch = _Scratch(min(height, max(1, _BLOCK_ELEMENTS // columns)), columns, tensor.dtype)
    a, b = (factor.to(scratch.delta.dtype) for factor in reader.pair(layer, projection))
    b, scale = b.unflatten(0, (groups, height)), reader.scale(layer, projection)
    change = size = 0.0
    for group in range(groups):
        for first in range(0, height, scratch.rows):
            block, own = rows[group, first : first + scratch.rows], b[group, first : first + scratch.rows]
            more, before = scratch.add(block, own, a, scale)
            change, size = change + more, size + before
    return _ratio(change, size)


class _Scratch:
    """Buffers for one block of rows, used over and over: fresh pages for each would cost more than the arithmetic."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.rows = rows
        wide = torch.promote_types(dtype, torch.float32)
        # Zeros: a BLAS may read what its output holds, and a NaN that lay in memory would stay one times zero.
        self.delta, self.sum = (torch.zeros(rows, columns, dtype=wide) for _ in range(2))
        self.rounded, self.same = torch.empty(rows, columns, dtype=dtype), torch.empty(rows, columns, dtype=torch.bool)

    def add(self, block: Tensor, b: Tensor, a: Tensor, scale: float) -> tuple[float, float]:
        """block [n, in] += scale b [n, r] a [r, in], rounded once; both squared norms before. Raises OverflowError."""
        n = len(block)
        delta, total, rounded, same = self.delta[:n], self.sum[:n], self.rounded[:n], self.same[:n]
        torch.matmul(b, a, out=delta).mul_(scale)
        total.copy_(block)
        norms = _squared(delta), _squared(total)
        rounded.copy_(total.add_(delta))
        torch.eq(delta, 0, out=same)  # what does not change keeps its bits, the sign of -0 too
        torch.where(same, block, rounded, out=rounded)
        _assign(block, rounded)
        return norms


def _row_edits(checkpoint: HfCheckpoint, reader: AdapterReader) -> Iterator[tuple[str, Edit]]:
    """(tensor, edit) of a method that trained parameters of the base: its rows take the place of the base's."""
    shape = checkpoint.shape
    methods: tuple[Method, ...] = (BitFit(), FineTuneTop(shape.num_layers))
    trained = next((m.is_trainable for m in methods if m.name == reader.facts.get("method")), None)
    if trained is None:
        raise CheckpointError(f"{reader.folder}: method {reader.facts.get('method')!r} cannot be merged")
    expected = {name for name in base_tensor_names(shape) if trained(name)}
    if wrong := sorted(expected ^ set(reader.names())):
        says = "is missing" if wrong[0] in expected else "does not belong there"
        raise CheckpointError(f"{reader.folder}: {wrong[0]} {says}")
    for name in sorted(expected):
        for projection, piece in pieces_of(checkpoint.family, shape, name):
            yield piece.tensor, partial(_replace_rows, piece, reader, name, projection)


def _replace_rows(piece: Piece, reader: AdapterReader, name: str, projection: str, tensor: Tensor) -> float:
    """Put a projection's rows of the adapter's `name` in place of the piece's. Raises OverflowError."""
    rows, parts = _rows(piece, tensor), fused_rows(name.split(".")[-2], reader.shape, tensor_size=1)
    part = parts.get(projection, whole(projection, piece.shape[0])[0])  # a projection that is not fused is all of it
    trained = reader.tensor(name, (part.groups * part.stride, *piece.shape[1:]))
    new = part.rows_of(trained).reshape(rows.shape)
    ratio = _ratio(_squared(new.double() - rows.double()), _squared(rows))
    _assign(rows, new.to(rows.dtype))
    return ratio


def _rows(piece: Piece, tensor: Tensor) -> Tensor:
    """A view of the piece's rows in the stored tensor: [groups, rows of a group(, columns)]."""
    return piece.rows.rows_of(tensor.t() if piece.transposed else tensor)


def _assign(rows: Tensor, values: Tensor) -> None:
    if not all_finite(values):
        raise OverflowError
    rows.copy_(values)


def _squared(tensor: Tensor) -> float:
    """Sum of the squares."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))) ** 2


def _ratio(change: float, size: float) -> float:
    return math.sqrt(change / size) if size else math.inf if change else 0.0


def _other_files(checkpoint: HfCheckpoint) -> list[Path]:
    """Configuration, tokenizer, generation and whatever else stands beside the weights, no weights of any format.

    An index or an adapter configuration of weights that stay behind would mislead a loader, so they stay too.
    """
    single = [file.path.name for file in checkpoint.files] == [SINGLE]
    paths = sorted(path for path in checkpoint.folder.iterdir() if path.suffix not in _WEIGHTS and path.is_file())
    indices = {path.name for path in paths if path.name.endswith(".index.json")}
    left = (indices - (set() if single else {INDEX})) | {ADAPTER_CONFIG}
    return [path for path in paths if path.name not in left]


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as reading, open(target, "xb") as writing:
        shutil.copyfileobj(reading, writing)
        writing.flush()
        os.fsync(writing.fileno())

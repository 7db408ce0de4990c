# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face checkpoint folder: safetensors in one file or in several with an index, opened and never loaded whole.

Nothing in it is trusted: names, shapes and types are compared with what `config.json` calls for, and an index cannot
name a file outside of its folder. Pickle files are refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from lora_megatron.checkpoint.base import base_tensor_names
from lora_megatron.checkpoint.tensors import fingerprint
from lora_megatron.errors import CheckpointError
from lora_megatron.huggingface.configuration import CONFIG, read_configuration
from lora_megatron.huggingface.layout import Piece, stored_shapes
from lora_megatron.strict_json import load_json_object
from lora_megatron.strict_safetensors import SafetensorsFile, TensorSlice

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` looks like a Hugging Face model rather than one of this project's."""
    try:
        return "model_type" in load_json_object(folder / CONFIG, "a configuration", CheckpointError)
    except CheckpointError:
        return any((folder / name).exists() for name in (SINGLE, INDEX))


class HfCheckpoint:
    """An open checkpoint whose tensors are exactly those its configuration calls for.

    `tensors` maps the full name (with the backbone's beginning, which a bare backbone's file leaves out) to a slice
    that reads byte ranges; `files` are the open files in their order.

    Raises:
        CheckpointError: unsupported, damaged, incomplete, or with tensors that do not belong there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.family, self.shape = read_configuration(folder)
        self.files: list[SafetensorsFile] = []
        self.tensors: dict[str, TensorSlice] = {}
        self._stored: dict[str, str] = {}
        try:
            for path in _weight_files(folder):
                self.files.append(SafetensorsFile(path))
            self._collect()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; the slices cannot read any more."""
        for file in self.files:
            file.close()

    def full_name(self, stored: str) -> str:
        """The full name of a tensor under its name in the files; the same for one that holds no weights."""
        return self._stored.get(stored, stored)

    def _collect(self) -> None:
        family = self.family
        found = {name: file for file in self.files for name in file.entries}
        bare = not any(name.startswith(family.backbone) for name in found)
        buffers = re.compile("|".join(family.buffers) or r"(?!)")
        for stored, file in found.items():
            relative = stored if bare else stored.removeprefix(family.backbone)
            if buffers.fullmatch(relative):
                continue
            full = family.backbone + stored if bare and stored != family.head else stored
            self._stored[stored] = full
            self.tensors[full] = file.tensor(stored)
        self._check()

    def _check(self) -> None:
        shape, family, tensors = self.shape, self.family, self.tensors
        expected = dict(stored_shapes(family, shape, base_tensor_names(shape)))
        if missing := sorted(set(expected) - set(tensors)):
            raise CheckpointError(
                f"{self.folder}: {len(missing)} tensors of its {CONFIG} are missing, the first is {missing[0]}"
            )
        optional = {family.head} if shape.tied_embeddings else set()  # a tied head may be stored, and does not count
        if extra := sorted(set(tensors) - set(expected) - optional):
            raise CheckpointError(
                f"{self.folder}: {len(extra)} tensors do not belong to a {family.model_type} as its {CONFIG} describes "
                f"it, the first is {extra[0]}"
            )
        if optional & set(tensors):
            expected[family.head] = expected[family.backbone + family.embedding]
        for name, wanted in expected.items():
            if tensors[name].shape != wanted:
                raise CheckpointError(
                    f"{self.folder}: {name} has shape {list(tensors[name].shape)}, its {CONFIG} says {list(wanted)}"
                )
            if tensors[name].dtype not in _FLOATS:
                raise CheckpointError(
                    f"{self.folder}: {name} is of {tensors[name].dtype}; only floating-point weights are supported"
                )

        if optional & set(tensors):
            self._check_tied_head()

    def _check_tied_head(self) -> None:
        """A stored head that is not the embedding is not tied, whatever the configuration says."""
        head, embedding = self.tensors[self.family.head], self.tensors[self.family.backbone + self.family.embedding]
        if head.dtype != embedding.dtype or head.sample() != embedding.sample():
            raise CheckpointError(
                f"{self.folder}: {self.family.head} is stored and is not the embedding, although its {CONFIG} ties "
                "them: set tie_word_embeddings to false there"
            )

    def view(self, piece: Piece) -> PieceView:
        """A piece as a matrix or vector of ours, readable in parts."""
        return PieceView(self.tensors[piece.tensor], piece)

    def fingerprint(self) -> str:
        """What tells this base from another: its shape and, of each tensor, name, type, shape and a sample of bytes.

        The first, middle and last kilobyte stand for a tensor: reading all of a large model at every start would take
        longer than loading it. How the tensors are spread over files does not count.
        """
        facts = [self.family.model_type, json.dumps(self.shape.to_dict(), sort_keys=True)]
        for name, tensor in sorted(self.tensors.items()):
            if name != self.family.head or not self.shape.tied_embeddings:
                sample = hashlib.sha256(tensor.sample()).hexdigest()
                facts.append(f"{name} {tensor.dtype} {list(tensor.shape)} {sample}")
        return fingerprint(facts)


class PieceView:
    """A piece that slices like a tensor of its shape; only the bytes of the slice are read."""

    def __init__(self, stored: TensorSlice, piece: Piece) -> None:
        self._stored, self._piece = stored, piece
        self.shape, self.dtype = piece.shape, stored.dtype

    def __getitem__(self, where: Any) -> Tensor:
        """view[a:b] or view[a:b, c:d] -> a new tensor. Of interleaved rows whole groups only."""
        rows, *columns = where if isinstance(where, tuple) else (where,)
        first, last, _ = rows.indices(self.shape[0])
        runs = [self._read(slice(a, b), *columns) for a, b in self._runs(first, last)]
        return runs[0] if len(runs) == 1 else torch.cat(runs)

    def _runs(self, first: int, last: int) -> Sequence[tuple[int, int]]:
        """Rows first..last of the piece as runs of rows of the stored tensor."""
        part = self._piece.rows
        if part.groups == 1:
            return [(part.start + first, part.start + last)]
        height = part.stop - part.start
        assert first % height == last % height == 0, "a rank holds whole query groups"
        return [
            (g * part.stride + part.start, g * part.stride + part.stop) for g in range(first // height, last // height)
        ]

    def _read(self, rows: slice, columns: slice = slice(None)) -> Tensor:
        if self._piece.columns is None:
            return self._stored[rows]
        return self._stored[columns, rows].t() if self._piece.transposed else self._stored[rows, columns]


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by its index if there is one; the index is held to what the files hold."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        raise CheckpointError(_nothing_to_read(folder))
    where = load_json_object(folder / INDEX, "the index of a checkpoint", CheckpointError).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{folder / INDEX}: weight_map must map tensor names to files")
    for name, file in where.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", file):
            raise CheckpointError(
                f"{folder / INDEX}: {name!r} is said to be in {file!r}, which is no file of this folder"
            )
    paths = [folder / file for file in sorted(set(where.values()))]
    for path in paths:
        listed = {name for name, file in where.items() if file == path.name}
        with SafetensorsFile(path) as opened:
            held = set(opened.entries)
        if listed != held:
            name = min(listed ^ held)
            says = "is listed for it and not there" if name in listed else "is there and not listed for it"
            raise CheckpointError(f"{path}: {name} {says} in {INDEX}")
    return paths


def _nothing_to_read(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        return (
            f"{folder} holds {pickles[0]} and no safetensors: pickle files can run code and are never read; convert it "
            "where you trust it, with transformers' model.save_pretrained(DIR)"
        )
    return f"{folder} holds neither {SINGLE} nor {INDEX}: give the folder of a Hugging Face model"

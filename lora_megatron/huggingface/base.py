# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face checkpoint as the base of a run: each rank reads the byte ranges of its own shard, piece by piece.

Nothing larger than one rank's part of one tensor is ever held beside the model, so host memory stays near the shard's
own size whatever the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from torch import Tensor, nn

from lora_megatron.checkpoint.base import Base, describe_base
from lora_megatron.checkpoint.tensors import all_finite
from lora_megatron.errors import CheckpointError
from lora_megatron.huggingface.checkpoint import HfCheckpoint, is_checkpoint
from lora_megatron.huggingface.layout import Piece, fused_rows, pieces_of
from lora_megatron.layers.sharding import Shard, shard_of
from lora_megatron.layers.storage.stored import writable
from lora_megatron.measure.console import BytesProgress
from lora_megatron.model.names import Named, named_parameters
from lora_megatron.parallel.agree import is_main
from lora_megatron.parallel.heartbeat import beat


def open_base(folder: Path) -> Base:
    """The stored model in `folder`, Hugging Face's or this project's.

    Raises:
        CheckpointError: it is neither, or damaged.
    """
    return describe_hf_base(folder) if is_checkpoint(folder) else describe_base(folder)


def describe_hf_base(folder: Path) -> Base:
    """What the checkpoint in `folder` is; nothing but headers and samples is read.

    Raises:
        CheckpointError: see `HfCheckpoint`.
    """
    with HfCheckpoint(folder) as checkpoint:
        return Base(checkpoint.shape, checkpoint.fingerprint(), lambda chunks: load_hf_base(folder, chunks))


def load_hf_base(folder: Path, chunks: Sequence[nn.Module]) -> None:
    """Fill the base parameters of this rank's chunks; adapters keep their values. Shows a bar of bytes on rank 0.

    Raises:
        CheckpointError: the files changed under the run, or hold values that are not finite.
    """
    mine = [n for n in named_parameters(chunks) if ".adapters." not in n.name]
    with HfCheckpoint(folder) as checkpoint, torch.no_grad():
        loader = _Loader(checkpoint)
        total = sum(loader.bytes_of(named) for named in mine)
        with BytesProgress(total, description=f"load {folder.name}", enabled=is_main()) as progress:
            for named in mine:
                loader.fill(named, progress.advance)
                beat()


class _Loader:
    def __init__(self, checkpoint: HfCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.rank, self.size = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()

    def pieces(self, named: Named) -> list[tuple[str, Piece]]:
        return pieces_of(self.checkpoint.family, self.checkpoint.shape, named.name)

    def bytes_of(self, named: Named) -> int:
        """Bytes that this rank will read for a parameter."""
        dtype = self.checkpoint.tensors[self.pieces(named)[0][1].tensor].dtype
        return named.parameter.numel() * dtype.itemsize

    def fill(self, named: Named, advance: Callable[[int], None]) -> None:
        with writable(named.parameter) as target:
            self._fill(named, target, advance)

    def _fill(self, named: Named, values: Tensor, advance: Callable[[int], None]) -> None:
        pieces = self.pieces(named)
        if len(pieces) == 1:
            shard = shard_of(named.parameter)
            full = shard.full_shape(values.shape, self.size)
            values.copy_(self._part(pieces[0][1], shard, full, advance))
            return
        module = named.name.split(".")[-2]
        rows = fused_rows(module, self.checkpoint.shape, tensor_size=self.size)
        for projection, piece in pieces:
            target = rows[projection].rows_of(values)
            target.copy_(self._part(piece, Shard(0), piece.shape, advance).view_as(target))

    def _part(self, piece: Piece, shard: Shard, full: tuple[int, ...], advance: Callable[[int], None]) -> Tensor:
        """This tensor rank's part of a piece, finite."""
        view: Any = self.checkpoint.view(piece)
        assert view.shape == full, (piece, full)
        part = shard.part(view, full, self.rank, self.size).contiguous()
        if not all_finite(part):
            raise CheckpointError(f"{self.checkpoint.folder}: {piece.tensor} holds values that are not finite")
        advance(part.numel() * part.element_size())
        return part

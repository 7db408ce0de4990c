# SPDX-License-Identifier: Apache-2.0
"""Whole tensors out of a sharded model into safetensors files, and this rank's parts back.

Files hold true, unsharded tensors under global names, so they know nothing of the layout that wrote them. Each
pipeline stage writes its own file (tensor rank 0 of the first data-parallel replica does); a reader opens whatever
files there are and takes only the byte ranges of its own part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor, nn

from lora_megatron.checkpoint.folder import Receipt
from lora_megatron.errors import CheckpointError, NumericalError
from lora_megatron.layers.sharding import Shard
from lora_megatron.parallel.heartbeat import beat
from lora_megatron.strict_json import file_sha256
from lora_megatron.strict_safetensors import BLOCK, DTYPE_NAMES, SafetensorsFile, SafetensorsWriter, TensorSlice

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MOST_PAGE_LOCKED = 2**30
"""Bytes of a snapshot that go through page-locked memory, which a GPU fills faster and no other program can use."""


def is_writer() -> bool:
    """Whether this rank writes its pipeline stage's tensors."""
    return mpu.get_tensor_model_parallel_rank() == 0 and _is_first_replica()


def _is_first_replica() -> bool:
    return mpu.get_data_parallel_rank(with_context_parallel=True) == 0


def join_over_tensor_group(part: Tensor, shard: Shard) -> Tensor:
    """The true tensor on this device, from every tensor rank's part; collective over the tensor-parallel group."""
    group = mpu.get_tensor_model_parallel_group()
    part = part.detach().contiguous()
    if shard.axis is None or group.size() == 1:
        return shard.join([part])
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part, group=group)
    return shard.join(parts)


def gather_stage(tensors: Iterable[tuple[str, Tensor, Shard]]) -> dict[str, Tensor]:
    """The true tensors of this stage from (name, part, shard), on the CPU of its writer; elsewhere nothing is kept.

    Every rank of the stage must call it, and run through all of `tensors`, whose making may be collective. What it
    answers shares no memory with a parameter, so training may go on while it is written; other tensors in `tensors`
    must be new, as those of `Optimizer.named_state` are.

    Raises:
        NumericalError: on the writer, at the end: a tensor is not finite, so that no loader would take the file.
    """
    whole: dict[str, Tensor] = {}
    extremes: list[Tensor] = []
    page_locked = 0
    for name, part, shard in tensors:
        beat()
        if not _is_first_replica():
            continue  # the others' parts are the same
        joined = join_over_tensor_group(part, shard)
        if not is_writer():
            continue
        extremes.append(_extremes(joined))  # where the tensor is: a GPU needs no time for it
        lock_pages = joined.is_cuda and page_locked < _MOST_PAGE_LOCKED
        page_locked += joined.nbytes if lock_pages else 0
        copy = joined.contiguous().to("cpu", non_blocking=lock_pages)
        whole[name] = copy.clone() if isinstance(part, nn.Parameter) and _share_memory(copy, part) else copy
    bounds = torch.stack(extremes).cpu() if extremes else torch.zeros(0, 2)  # also waits for the copies of a GPU
    for name, finite in zip(whole, torch.isfinite(bounds).all(1).tolist(), strict=True):
        if not finite:
            raise NumericalError(
                f"{name} holds values that are not finite, so nothing was written; lower optimizer.lr or "
                "optimizer.weight_decay, or set optimizer.clip_grad"
            )
    return whole


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def write_stage_file(path: Path, tensors: Iterable[tuple[str, Tensor, Shard]], metadata: dict[str, str]) -> None:
    """Write (name, part, shard) of this stage as one file on the writer; every rank of the stage must call it.

    Raises:
        NumericalError: on the writer, when every rank has gone through all tensors: one is not finite, so that no
            loader would take the file.
    """
    if whole := gather_stage(tensors):
        save_tensors(path, whole, metadata)


def save_tensors(path: Path, tensors: Mapping[str, Tensor | TensorSlice], metadata: dict[str, str]) -> Receipt:
    """Write and fsync one safetensors file, and read it back.

    A slice of another file is copied as it stands, without being in memory as a whole. The receipt's hash is that of
    the bytes in memory, and the file has been found to have it.

    Raises:
        CheckpointError: the disk is full or gone, or holds something else than what was written.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # so that each starts aligned
    entries = [(name, tensors[name].dtype, tensors[name].shape) for name in names]
    with SafetensorsWriter(path, entries, metadata, hashed=True) as writer:
        for name in names:
            beat()
            tensor = tensors[name]
            if isinstance(tensor, TensorSlice):
                writer.write_raw(name, tensor)
            else:
                writer.write(name, tensor)
    if file_sha256(path, CheckpointError, progress=beat) != writer.sha256:
        raise CheckpointError(f"{path} does not read back as it was written: check the disk, or choose another run.dir")
    return Receipt(writer.sha256, path.stat().st_size)


class TensorFiles:
    """The tensors of some safetensors files, by name, readable in parts.

    Raises CheckpointError when a file is not safetensors or two files hold the same name.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._where: dict[str, SafetensorsFile] = {}
        with ExitStack() as opened:
            for path in paths:
                file = opened.enter_context(SafetensorsFile(path))
                for name in file.entries:
                    if name in self._where:
                        raise CheckpointError(f"{path} and {self._where[name].path} both hold {name}")
                    self._where[name] = file
            self._opened = opened.pop_all()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._where.clear()
        self._opened.close()

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._where)

    def require_names(self, expected: set[str], what: str) -> None:
        """Raise CheckpointError unless exactly `expected` is there."""
        if missing := sorted(expected - self.names):
            raise CheckpointError(f"{what}: {len(missing)} tensors are missing, the first is {missing[0]}")
        if unused := sorted(self.names - expected):
            raise CheckpointError(f"{what}: {len(unused)} tensors are not used by this model, the first is {unused[0]}")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return self._slice(name).shape

    def part(self, name: str, shard: Shard, *, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """This tensor rank's part of `name`; only its bytes are read.

        Raises CheckpointError when the tensor is missing, of another shape or dtype, or not finite.
        """
        view = self._slice(name)
        path = self._where[name].path
        if view.shape != shape:
            raise CheckpointError(f"{path}: {name} has shape {view.shape}, this model needs {shape}")
        if view.dtype not in _FLOATS or (dtype is not None and view.dtype != dtype):
            stored = DTYPE_NAMES[view.dtype]
            raise CheckpointError(f"{path}: {name} has dtype {stored}, expected {dtype or 'a float type'}")
        rank, size = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
        part = shard.part(view, shape, rank, size)
        if not all_finite(part):
            raise CheckpointError(f"{path}: {name} holds values that are not finite")
        return part

    def _slice(self, name: str) -> TensorSlice:
        if name not in self._where:
            files = sorted({str(file.path) for file in self._where.values()})
            raise CheckpointError(f"no tensor {name} in {', '.join(files)}")
        return self._where[name].tensor(name)


def require_finite(path: Path) -> None:
    """Raise CheckpointError when a tensor of the file holds a value that is not finite; reads block by block."""
    with SafetensorsFile(path) as file:
        for name, entry in file.entries.items():
            tensor = file.tensor(name)
            rows = max(1, BLOCK * entry.shape[0] // max(1, entry.bytes)) if entry.shape else 1
            starts = range(0, entry.shape[0], rows) if entry.shape else [0]
            blocks = (tensor[start : start + rows] if entry.shape else tensor[:] for start in starts)
            if entry.dtype in _FLOATS and not all(all_finite(block) for block in blocks):
                raise CheckpointError(f"{path}: {name} holds values that are not finite")


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite: one pass over the extremes, which NaN passes through.

    torch.isfinite on all values makes copies, and is slow in bf16 on a CPU: it took half of the time of loading.
    """
    return bool(torch.isfinite(_extremes(tensor)).all())


def _extremes(tensor: Tensor) -> Tensor:
    """Smallest and largest value, fp32 [2]; NaN when there is one, zeros of an empty tensor."""
    return torch.stack(torch.aminmax(tensor)).float() if tensor.numel() else torch.zeros(2, device=tensor.device)


def fingerprint(facts: Iterable[str]) -> str:
    """A short hash of facts in order, for telling one base from another."""
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]


Read = Callable[[str], Tensor]

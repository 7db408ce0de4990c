# SPDX-License-Identifier: Apache-2.0
"""Reading: an open file, and the tensors in it by slices."""

from __future__ import annotations

import itertools
import math
import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lora_megatron.errors import CheckpointError
from lora_megatron.strict_safetensors.header import MAX_HEADER_BYTES, Entry, HeaderDefect, parse_header

BLOCK = 16 * 2**20
_PICKLE = re.compile(rb"PK\x03\x04|\x80[\x02-\x05]")


class SafetensorsFile:
    """An open file: `entries` in the order of their data, `metadata`, and `header` as it stands, length included."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:  # without O_NONBLOCK, opening a pipe waits for its writer
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as problem:
            raise CheckpointError(f"cannot read {path}: {problem.strerror}") from problem
        try:
            status = os.fstat(self._descriptor)
            if not stat.S_ISREG(status.st_mode):
                kind = "Is a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
                raise CheckpointError(f"cannot read {path}: {kind}")
            self.header = self._read_header(status.st_size)
            self.entries, self.metadata = parse_header(self.header)
            stop = max((entry.stop for entry in self.entries.values()), default=len(self.header))
            if stop != status.st_size:
                defect = "truncated" if stop > status.st_size else "it has data after its last tensor"
                raise HeaderDefect(f"{defect}: {status.st_size} bytes, its header describes {stop}")
        except BaseException as problem:
            self.close()
            if isinstance(problem, HeaderDefect):
                raise CheckpointError(f"{path} is not a readable safetensors file: {problem}") from None
            raise

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back the file handle; no tensor can be read afterwards."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def tensor(self, name: str) -> TensorSlice:
        """The tensor `name`, of which nothing is read yet. Raises CheckpointError when there is none."""
        if name not in self.entries:
            raise CheckpointError(f"no tensor {name} in {self.path}")
        return TensorSlice(self, self.entries[name])

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes at `offset` of the file."""
        assert self._descriptor >= 0, f"{self.path} is closed"
        while view:
            try:
                count = os.preadv(self._descriptor, [view], offset)
            except OSError as problem:
                raise CheckpointError(f"cannot read {self.path}: {problem.strerror}") from problem
            if count == 0:
                raise CheckpointError(f"{self.path} is truncated: it became shorter while it was read")
            view, offset = view[count:], offset + count

    def read(self, offset: int, count: int) -> bytes:
        """The `count` bytes at `offset` of the file."""
        buffer = bytearray(count)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def _read_header(self, size: int) -> bytes:
        first = self.read(0, min(9, size))
        length = int.from_bytes(first[:8], "little")
        defect = ""
        if size < 8:
            defect = f"truncated: {size} bytes, the length of the header alone takes 8"
        elif not 0 < length <= MAX_HEADER_BYTES:
            defect = f"its header would have {length} bytes, allowed are 1 to {MAX_HEADER_BYTES}"
        elif length > size - 8:
            defect = f"truncated: {size} bytes, its header alone would have {length}"
        elif first[8:] != b"{":
            defect = "its header is not a JSON object"
        # Only a file that cannot be safetensors is asked whether it is a pickle: a header of 640 bytes starts alike.
        if defect and _PICKLE.match(first):
            defect = "pickle files are refused, as reading one runs code; convert it where you trust it, "
            defect += "with model.save_pretrained(DIR, safe_serialization=True)"
        if defect:
            raise HeaderDefect(defect)
        return self.read(0, 8 + length)


class TensorSlice:
    """A tensor in a file; indexing reads a part of it, and only the bytes of that part."""

    def __init__(self, file: SafetensorsFile, entry: Entry) -> None:
        self._file, self._entry = file, entry
        self.name, self.dtype, self.shape = entry.name, entry.dtype, entry.shape

    def __getitem__(self, where: slice | tuple[slice, ...]) -> Tensor:
        """A fresh CPU tensor of the part; `where` is one slice of step 1 for each of the first dimensions.

        One read where the part is contiguous in the file, else one for each contiguous run: `[:, a:b]` of a matrix
        reads b - a elements of each row. `[:]` is the whole tensor, of any number of dimensions.
        """
        cuts = where if isinstance(where, tuple) else (where,) if self.shape else ()
        assert len(cuts) <= len(self.shape), f"{len(cuts)} slices of a tensor of shape {self.shape}"
        bounds = [cut.indices(n) for cut, n in zip(cuts, self.shape, strict=False)]
        assert all(step == 1 for _, _, step in bounds), "only slices of step 1"
        starts = [start for start, _, _ in bounds] + [0] * (len(self.shape) - len(cuts))
        counts = [max(0, stop - start) for start, stop, _ in bounds] + list(self.shape[len(cuts) :])
        strides = [self.dtype.itemsize * math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        cut_axes = [axis for axis, n in enumerate(self.shape) if counts[axis] != n]
        inner = max(cut_axes, default=0)  # a run ends where the last dimension that is cut ends
        run = self.dtype.itemsize * math.prod(counts[inner:])

        buffer = torch.empty(self.dtype.itemsize * math.prod(counts), dtype=torch.uint8)
        if buffer.numel():
            view = buffer.numpy().data
            first = self._entry.start + sum(map(int.__mul__, starts, strides))
            for done, index in enumerate(itertools.product(*map(range, counts[:inner]))):
                offset = first + sum(map(int.__mul__, index, strides))
                self._file.read_into(view[done * run : (done + 1) * run], offset)
        return buffer.view(self.dtype).view(counts)

    def sample(self, count: int = 1024) -> bytes:
        """The first, middle and last `count` bytes of the data, all of it where that is not more; for fingerprints."""
        start, size = self._entry.start, self._entry.bytes
        if size <= 3 * count:
            return self._file.read(start, size)
        return b"".join(self._file.read(start + at, count) for at in (0, (size - count) // 2, size - count))

    def copy_to(self, stream: BinaryIO) -> None:
        """Write the data as it stands to `stream`, in blocks of 16 MiB; the stream's own OSError passes through."""
        buffer = memoryview(bytearray(min(BLOCK, self._entry.bytes)))
        for offset in range(self._entry.start, self._entry.stop, BLOCK):
            block = buffer[: self._entry.stop - offset]
            self._file.read_into(block, offset)
            write_all(stream, block)


def write_all(stream: BinaryIO, view: memoryview) -> None:
    """Write all of `view`: an unbuffered stream may take only a part at once."""
    while view:
        view = view[stream.write(view) :]

# SPDX-License-Identifier: Apache-2.0
"""Writing: one tensor in memory at a time, in the order announced."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_megatron.errors import CheckpointError
from lora_megatron.strict_safetensors.header import Entry, HeaderDefect, make_header, parse_header
from lora_megatron.strict_safetensors.reader import TensorSlice, write_all


class SafetensorsWriter:
    """Writes the tensors `entries` (name, dtype, shape) in that order; the same content gives the same bytes.

    `header` instead of `entries` and `metadata`: that of another file, verbatim, to write a file of the same layout.
    With `hashed`, `sha256` is that of the bytes as they were handed over, in hex, once the file is closed.
    Left through an error it leaves an unfinished file, which every reader refuses.
    """

    def __init__(
        self,
        path: Path,
        entries: Iterable[tuple[str, torch.dtype, Sequence[int]]] = (),
        metadata: Mapping[str, str] | None = None,
        *,
        header: bytes | None = None,
        hashed: bool = False,
    ) -> None:
        self.path = path
        self._digest = hashlib.sha256() if hashed else None
        try:
            self.header = make_header(entries, metadata or {}) if header is None else header
            self._waiting = list(reversed(parse_header(self.header)[0].values()))
        except HeaderDefect as defect:
            raise CheckpointError(f"cannot write {path}: {defect}") from None
        with self._writing():
            self._stream: Any = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by close() or __exit__
            if self._digest is not None:
                self._stream = _Hashing(self._stream, self._digest)
        try:
            with self._writing():
                write_all(self._stream, memoryview(self.header))
        except CheckpointError:
            self._stream.close()
            raise

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._stream.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor, from any device."""
        if self._next(name, tensor).bytes:
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            with self._writing():
                write_all(self._stream, data.numpy().data)

    def write_raw(self, name: str, source: TensorSlice) -> None:
        """The next tensor, its bytes copied from another file."""
        self._next(name, source)
        with self._writing():
            source.copy_to(self._stream)

    def close(self) -> None:
        """Flush to the disk and close; a tensor not yet written is a bug."""
        with self._stream, self._writing():
            assert not self._waiting, f"{self.path}: {self._waiting[-1].name} was not written"
            os.fsync(self._stream.fileno())

    @property
    def sha256(self) -> str:
        """SHA-256 of what was written, in hex; only with `hashed`."""
        assert self._digest is not None, "the writer was not asked to hash"
        return self._digest.hexdigest()

    def _next(self, name: str, given: Tensor | TensorSlice) -> Entry:
        assert self._waiting, f"{self.path}: {name} is one tensor too many"
        entry = self._waiting.pop()
        found, wanted = (name, given.dtype, tuple(given.shape)), (entry.name, entry.dtype, entry.shape)
        assert found == wanted, f"{self.path}: {found} was given, next is {wanted}"
        return entry

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            raise CheckpointError(
                f"cannot write {self.path}: {problem.strerror}; free some space or choose another folder"
            ) from problem


class _Hashing:
    """An unbuffered file that hashes what it takes."""

    def __init__(self, stream: Any, digest: Any) -> None:
        self._stream, self._digest = stream, digest
        self.close, self.fileno = stream.close, stream.fileno

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, view: memoryview) -> int:
        """Bytes taken, which may be fewer than given."""
        count: int = self._stream.write(view)
        self._digest.update(view[:count])
        return count

# SPDX-License-Identifier: Apache-2.0
"""Memory of this rank by kind: weights, gradients, optimizer state, activations.

The first three are sums over tensors that exist. Activations come and go, so a meter watches a step: on a GPU through
the allocator's high-water mark, on a CPU, which has none, through autograd's own book-keeping of what a backward pass
will need.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from lora_megatron.parallel.agree import gather_text


@dataclass(frozen=True)
class MemoryByKind:
    """Bytes on one rank."""

    weights: int
    """Parameters and buffers, frozen and trained."""
    gradients: int
    """Gradient buffers; only trained parameters have them."""
    optimizer: int
    """Moments, and fp32 master copies where training is in bf16."""
    activations: int
    """The most that was held for a backward pass at one time; on a GPU with temporary tensors on top."""
    peak: int
    """GPU: the allocator's high-water mark. CPU: the sum of the four kinds."""
    trained: int
    """Of `weights`, what training changes; the rest is frozen."""
    reserved: int
    """GPU: the most that the allocator held of the device, in use or not. CPU: as `peak`."""


def _tensors(chunks: Sequence[nn.Module]) -> Iterator[Tensor]:
    for chunk in chunks:
        yield from chunk.parameters()
        yield from chunk.buffers()


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address of each distinct storage -> its bytes; a tied weight or a view counts once."""
    storages = (tensor.untyped_storage() for tensor in tensors if not tensor.is_meta)
    return {storage._cdata: storage.nbytes() for storage in storages}


def weight_bytes(chunks: Sequence[nn.Module]) -> int:
    """Bytes of all parameters and buffers of this rank's chunks, each storage once."""
    return sum(_storages(_tensors(chunks)).values())


def trained_bytes(chunks: Sequence[nn.Module]) -> int:
    """Bytes of the parameters that get gradients, each storage once."""
    return sum(_storages(tensor for tensor in _tensors(chunks) if tensor.requires_grad).values())


class _Saved:
    """A tensor that autograd keeps; tells the meter when autograd lets go of it."""

    __slots__ = ("_key", "_meter", "tensor")

    def __init__(self, tensor: Tensor, meter: ActivationMeter, key: int) -> None:
        self.tensor = tensor
        self._meter = meter
        self._key = key

    def __del__(self) -> None:
        self._meter._release(self._key)


class ActivationMeter:
    """Measures the memory that the steps inside `with meter:` hold for their backward passes.

    A tensor in an autograd graph is counted from the operation that saves it to the one that frees it, each storage
    once however many operations save a view of it, weights never. So recomputed layers and interleaved microbatches
    count as they come and go. Tensors are handed back as they were: results do not change.

    The same meter may be entered once a step; `last_bytes` is then that step's peak, `peak_bytes` the largest.
    """

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        self._chunks = list(chunks)
        self._use_cuda = any(tensor.is_cuda for tensor in _tensors(chunks))
        self._weights: dict[int, int] = {}
        self._live: dict[int, list[int]] = {}  # storage -> [references, bytes]
        self._live_bytes = 0
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None
        self.last_bytes = 0
        """CPU: peak bytes held for the backward pass in the last step. GPU: the allocator's peak in it."""
        self.peak_bytes = 0
        """The largest `last_bytes`."""
        self._reserved_bytes = 0

    @property
    def live_bytes(self) -> int:
        """Bytes held now; 0 between steps (CPU only)."""
        return self._live_bytes

    def __enter__(self) -> Self:
        if self._use_cuda:
            torch.cuda.reset_peak_memory_stats()
            return self
        self._weights = _storages(_tensors(self._chunks))
        self.last_bytes = self._live_bytes
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._use_cuda:
            self.last_bytes = torch.cuda.max_memory_allocated()
            self._reserved_bytes = max(self._reserved_bytes, torch.cuda.max_memory_reserved())
        elif self._hooks is not None:
            self._hooks.__exit__(kind, error, _)
            self._hooks = None
        self.peak_bytes = max(self.peak_bytes, self.last_bytes)

    def _pack(self, tensor: Tensor) -> _Saved | Tensor:
        storage = tensor.untyped_storage()
        key: int = storage._cdata
        if key in self._weights:
            return tensor
        entry = self._live.get(key)
        if entry is None:
            size = storage.nbytes()
            self._live[key] = [1, size]
            self._live_bytes += size
            if self._live_bytes > self.last_bytes:
                self.last_bytes = self._live_bytes
        else:
            entry[0] += 1
        return _Saved(tensor, self, key)

    @staticmethod
    def _unpack(saved: _Saved | Tensor) -> Tensor:
        return saved.tensor if isinstance(saved, _Saved) else saved

    def _release(self, key: int) -> None:
        entry = self._live[key]
        entry[0] -= 1
        if entry[0] == 0:
            self._live_bytes -= entry[1]
            del self._live[key]

    @cached_property
    def _weight_bytes(self) -> tuple[int, int]:
        """(all, trained): asked for every step, and counting some thousand tensors takes milliseconds."""
        return weight_bytes(self._chunks), trained_bytes(self._chunks)

    def memory(self, *, gradients: int, optimizer: int) -> MemoryByKind:
        """Memory by kind over the steps measured; `gradients` and `optimizer` in bytes, as the optimizer tells.

        The weights are those of the first call: a training neither adds nor removes any.
        """
        weights, trained = self._weight_bytes
        persistent = weights + gradients + optimizer
        activations = max(0, self.peak_bytes - persistent) if self._use_cuda else self.peak_bytes
        peak = self.peak_bytes if self._use_cuda else persistent + activations
        return MemoryByKind(
            weights=weights,
            gradients=gradients,
            optimizer=optimizer,
            activations=activations,
            peak=peak,
            trained=trained,
            reserved=self._reserved_bytes if self._use_cuda else peak,
        )


def gather_memory(mine: MemoryByKind) -> list[MemoryByKind]:
    """Every rank's memory in rank order, on every rank; collective."""
    return [MemoryByKind(**json.loads(text)) for text in gather_text(json.dumps(asdict(mine)))]

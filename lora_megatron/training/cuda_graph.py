# SPDX-License-Identifier: Apache-2.0
"""`train.cuda_graph`: both passes over all microbatches of a step, and the reductions of gradients, as one CUDA graph.

An eager step launches some hundred kernels a layer, one by one. Where they are short (a small model, few tokens, the
share of one of many tensor ranks) the GPU waits for the host; a graph of all of them is launched at once. It repeats
the same kernels on the same addresses, so results are those of the eager step to the bit. What changes from step to
step must lie where it lay when the graph was captured:

| what                           | where                                                                      |
|--------------------------------|----------------------------------------------------------------------------|
| microbatches                   | copied into tensors of this file before each launch                        |
| parameters, gradients          | the layers, megatron-core's DDP and the optimizers update them in place    |
| activations, losses            | the graph's own memory, which nothing else can use between steps           |
| tables that layers make once   | kept by their makers for the process's life, or else here                  |
| random numbers                 | none: dropout is refused (`model.checks`)                                  |

All of it, and DDP's making, runs on one stream that is not the default one: autograd sums each gradient on the stream
on which DDP first met the parameter, and the default stream may not take part in a capture.

Steps of other shapes, and every evaluation, run eagerly. The optimizer's step is a graph of its own
(`training.optimizer_graph`): between the two the host looks at the loss and may leave the update out.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import random as megatron_random
from torch import Tensor

from lora_megatron.layers.aside import forget_all, wait_for_all
from lora_megatron.layers.exchange import forget_turns
from lora_megatron.training.step import Batch, StepLoss, make, reduce_reports, run_passes

WARM_UP_STEPS = 2
"""Eager ones before the capture: they compile kernels, make tables and communicators, choose libraries' algorithms."""
Shapes = tuple[Any, ...]
Result = TypeVar("Result")


def shapes_of(batch: Batch, count: int) -> Shapes:
    """What a graph depends on: how many microbatches, and of each tensor its name, shape and type."""
    tensors = ((key, tuple(value.shape), value.dtype) for key, value in batch.items() if isinstance(value, Tensor))
    return count, *sorted(tensors)


class Turn(enum.Enum):
    """How a step runs."""

    EAGER = "eager"
    CAPTURE = "capture"
    REPLAY = "replay"


class Turns:
    """Which step runs how: the first shapes that come in enough steps in a row are captured, and no others ever."""

    def __init__(self) -> None:
        self._captured: Shapes | None = None
        self._last: Shapes | None = None
        self._in_a_row = 0

    def next(self, shapes: Shapes) -> Turn:
        """Of a step of these shapes."""
        if self._captured is not None:
            return Turn.REPLAY if shapes == self._captured else Turn.EAGER
        self._in_a_row = self._in_a_row + 1 if shapes == self._last else 1
        self._last = shapes
        if self._in_a_row <= WARM_UP_STEPS:
            return Turn.EAGER
        self._captured = shapes
        return Turn.CAPTURE


class StaticInputs:
    """The microbatches of a captured step, on a device, where they stay."""

    def __init__(self, like: Batch, count: int, device: torch.device) -> None:
        self._shapes = shapes_of(like, 1)
        self.batches: list[Batch] = [
            {k: torch.empty_like(v, device=device) if isinstance(v, Tensor) else None for k, v in like.items()}
            for _ in range(count)
        ]
        """As those of a `BatchSource`; `first_sample` is None."""

    def fill(self, index: int, batch: Batch) -> bool:
        """Take over a microbatch; False, and nothing, if its shapes are others."""
        if shapes_of(batch, 1) != self._shapes:
            return False
        for key, place in self.batches[index].items():
            if place is not None:
                place.copy_(batch[key], non_blocking=True)
        return True


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    reports: list[Tensor]
    """The losses of the last launch."""
    kept: list[Tensor]
    """What the graph reads or writes and only a cache of megatron-core's holds, which may let go of it."""


@functools.cache
def _stream() -> torch.cuda.Stream:
    """Of all graphs of this process, one after the other: cuBLAS keeps a workspace for every stream it has seen. Its
    kernels go before those of `layers.aside` where both want a processor, and before those of NCCL's streams."""
    return torch.cuda.Stream(priority=-1)


class StepGraph:
    """The graph of a trainer's step, and the stream it lives on. Needs a CUDA device, which the process stays on."""

    def __init__(self) -> None:
        self._stream = _stream()
        self._turns = Turns()
        self._inputs: StaticInputs | None = None
        self._captured: _Captured | None = None
        self._released_too: list[Callable[[], None]] = []

    @property
    def is_captured(self) -> bool:
        """Whether steps of the captured shapes are only launched from now on."""
        return self._captured is not None

    @contextlib.contextmanager
    def on_its_stream(self) -> Iterator[None]:
        """Within, work goes to the graph's stream: after all that was given to the current one, which waits for it at
        the end."""
        before = torch.cuda.current_stream()
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            yield
        before.wait_stream(self._stream)

    def run_microbatches(
        self, ddp_chunks: Sequence[DistributedDataParallel], microbatches: Sequence[Batch]
    ) -> StepLoss:
        """As `training.step.run_microbatches`, forward and backward; DDP must have been made on this stream."""
        with self.on_its_stream():
            reports = self._reports(ddp_chunks, microbatches)
        return reduce_reports(reports)

    def release(self) -> None:
        """Give the graph's memory back; steps after this warm up again."""
        self._captured = self._inputs = None
        self._turns = Turns()
        for release in self._released_too:
            release()

    def release_too(self, release: Callable[[], None]) -> None:
        """Call this with `release`: another graph goes with this one."""
        self._released_too.append(release)

    def _reports(self, ddp_chunks: Sequence[DistributedDataParallel], microbatches: Sequence[Batch]) -> list[Tensor]:
        first, count = make(microbatches, 0), len(microbatches)
        turn = self._turns.next(shapes_of(first, count))
        if turn is Turn.EAGER:
            return run_passes(ddp_chunks, microbatches)
        if self._inputs is None:
            self._inputs = StaticInputs(first, count, torch.device("cuda", torch.cuda.current_device()))
        inputs, rest = self._inputs, range(1, count)
        if not (inputs.fill(0, first) and all(inputs.fill(index, make(microbatches, index)) for index in rest)):
            return run_passes(ddp_chunks, microbatches)  # microbatches of several shapes in one step
        if self._captured is None:
            self._captured = self._capture(ddp_chunks, inputs)
        self._captured.graph.replay()
        forget_turns()
        return self._captured.reports

    def _capture(self, ddp_chunks: Sequence[DistributedDataParallel], inputs: StaticInputs) -> _Captured:
        """Record a step without running it."""
        kept = list[Tensor]()
        torch.cuda.synchronize()
        # The graph gets memory of its own. Whatever the eager steps have left must make room for it: a model that just
        # fits has to fit twice otherwise.
        gc.collect()
        torch.cuda.empty_cache()
        forget_turns()
        with _generators_left_alone(), _keeping_angles(ddp_chunks, kept):
            graph, reports = record(lambda: run_passes(ddp_chunks, inputs.batches))
        kept.extend(mpu.get_global_memory_buffer().buffer.values())  # gathered shards; replaced by larger ones
        return _Captured(graph, reports, kept)


def record(work: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """`work` as a graph, captured without running it, and what it returned, which each launch fills.

    Raises what `work` has failed with.
    """
    graph = torch.cuda.CUDAGraph()
    # Thread-local: NCCL's watchdog and a checkpoint's writer go on calling CUDA from threads of theirs.
    capture = torch.cuda.graph(graph, stream=_stream(), capture_error_mode="thread_local")
    try:
        with capture:
            result = work()
            wait_for_all()
    except RuntimeError as error:
        raise reason_of(error) from error
    finally:
        forget_all()
    return graph, result


def reason_of(error: BaseException) -> BaseException:
    """Why a capture has failed: it ends with an error of its own where a pass under it ran out of memory."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, torch.OutOfMemoryError):
            return seen
        seen = seen.__context__
    return error


@contextlib.contextmanager
def _generators_left_alone() -> Iterator[None]:
    """Within, megatron-core reads and sets no state of the GPU's generator, which a capture forbids.

    It does around recomputed layers and under sequence parallelism, so that their dropout repeats; there is none here,
    and no pass draws any other number.
    """
    tracker = megatron_random.get_cuda_rng_tracker()
    get, put = megatron_random._get_cuda_rng_state, megatron_random._set_cuda_rng_state
    state, tracked = get(), tracker.get_states()
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: state
    megatron_random._set_cuda_rng_state = lambda *args, **kwargs: None
    try:
        yield
    finally:
        megatron_random._get_cuda_rng_state, megatron_random._set_cuda_rng_state = get, put
        tracker.set_states(tracked)


@contextlib.contextmanager
def _keeping_angles(ddp_chunks: Sequence[DistributedDataParallel], kept: list[Tensor]) -> Iterator[None]:
    """Within, the rotary angles that a pass uses go into `kept`: megatron-core's cache forgets them once 32 other
    lengths were asked for, as decoding does."""
    modules = [m for chunk in ddp_chunks for m in chunk.modules() if isinstance(m, RotaryEmbedding)]
    hooks = [module.register_forward_hook(lambda _module, _args, angles: kept.append(angles)) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

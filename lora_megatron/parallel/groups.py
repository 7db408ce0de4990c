# SPDX-License-Identifier: Apache-2.0
"""The only creator of process groups, devices and global seeds.

`join_world`, then `build_mesh`, which turns a layout (tensor x pipeline x context, data parallelism is what is left)
into megatron-core's parallel state, over NCCL where every rank has a GPU and over gloo elsewhere. Every group gets an
explicit timeout.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel

from lora_megatron.errors import ConfigError, JoinError
from lora_megatron.parallel import cpu_backend, shared_box

if not torch.cuda.is_available():
    cpu_backend.install()


_WORLD = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
QUEUES, MOST_QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS", 32
"""The variable that says how many of a GPU's queues a process's streams are spread over, and how many there are."""
TORCH_SHARE = 0.98
"""Of a GPU's memory, what torch's allocator may take. It keeps what it has had, and gives nothing back when others ask:
CUDA, which loads a kernel when it is first started, and NCCL then fail, however much of it lies unused."""


@dataclass(frozen=True)
class Layout:
    """How one model is cut: sizes of the mesh axes. Data parallelism is world size / (tensor x pipeline x context)."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    sequence: bool = False

    @property
    def model_size(self) -> int:
        """Ranks that together hold one copy of the model."""
        return self.tensor * self.pipeline * self.context


@dataclass(frozen=True)
class Ranks:
    """Where this process stands in the mesh."""

    rank: int
    world_size: int
    tensor: int
    tensor_size: int
    pipeline: int
    pipeline_size: int
    data: int
    data_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def check_world_size(layout: Layout, world_size: int) -> None:
    """Raise ConfigError when the layout cannot fill the world."""
    if world_size % layout.model_size:
        raise ConfigError(
            f"world size {world_size} is not divisible by parallel.tensor x pipeline x context = {layout.tensor} x "
            f"{layout.pipeline} x {layout.context} = {layout.model_size}: start a multiple of {layout.model_size} "
            f"processes (torchrun --nproc-per-node {layout.model_size}) or change the layout"
        )


def join_world(*, timeout_minutes: float = 30.0, streams_wait: bool = False) -> None:
    """Join the world torchrun announced, or make a world of one; nothing when this process is in a world already.

    streams_wait: whether streams are to wait for other ranks (`parallel.stage_copies`), which must hold up no other
    stream: each then has a queue of its own, as a rule.

    Raises:
        JoinError: the environment announces a world that cannot be joined, or fewer GPUs are there than processes.
    """
    if dist.is_initialized():
        return
    timeout = timedelta(minutes=timeout_minutes)
    use_cuda = torch.cuda.is_available()
    if use_cuda:
        # In one queue kernels start in the order they are launched, so a collective launched before a GEMM overlaps
        # with it.
        os.environ.setdefault(QUEUES, str(MOST_QUEUES if streams_wait else 1))
        # NCCL registers the buffers of collectives in a CUDA graph, but not those of torch's expandable segments.
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
        torch.cuda.set_device(_own_gpu())
        torch.cuda.set_per_process_memory_fraction(TORCH_SHARE)
    backend = "nccl" if use_cuda else "gloo"
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    if missing := [name for name in _WORLD if not os.environ.get(name)]:
        raise JoinError(f"RANK is set and {missing[0]} is not: start with torchrun, or unset RANK for one process")
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        # A restarted attempt must not read the keys of the one that died (stale keys lose 7 restarts of 8).
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (ValueError, dist.DistError) as error:
        announced = ", ".join(f"{name}={os.environ[name]}" for name in ("RANK", *_WORLD))
        reason = str(error).splitlines()[0]
        raise JoinError(
            f"cannot join the processes of {announced} ({reason}): start every one of them with torchrun, with the "
            "same address and a free port"
        ) from error


def _own_gpu() -> int:
    """LOCAL_RANK, if every process of this machine has a GPU; all of them find out alike."""
    count = torch.cuda.device_count()
    try:
        rank, processes = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    except ValueError:
        raise JoinError("LOCAL_RANK and LOCAL_WORLD_SIZE must be numbers: torchrun sets them") from None
    if max(rank + 1, processes) > count:
        raise JoinError(
            f"{max(rank + 1, processes)} processes on a machine with {count} GPUs: start at most {count} "
            f'(torchrun --nproc-per-node {count}), or set CUDA_VISIBLE_DEVICES="" to use the CPU'
        )
    return rank


def device_memory_bytes() -> int | None:
    """Memory of the device this process trains on, None where the system does not tell."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def build_mesh(layout: Layout, *, seed: int, timeout_minutes: float = 30.0) -> Ranks:
    """Build megatron-core's groups for `layout` over the running world.

    Raises:
        ConfigError: the world size is not a multiple of tensor x pipeline x context.
    """
    world_size = dist.get_world_size()
    check_world_size(layout, world_size)
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        distributed_timeout_minutes=timeout_minutes,  # goes into a timedelta: fractions are fine
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if dist.get_backend() == "nccl":
        _connect(device)
    return Ranks(
        rank=dist.get_rank(),
        world_size=world_size,
        tensor=mpu.get_tensor_model_parallel_rank(),
        tensor_size=layout.tensor,
        pipeline=mpu.get_pipeline_model_parallel_rank(),
        pipeline_size=layout.pipeline,
        data=mpu.get_data_parallel_rank(),
        data_size=mpu.get_data_parallel_world_size(),
        device=device,
    )


def groups_of_a_step() -> Iterator[tuple[str, dist.ProcessGroup]]:
    """All that have a collective in a training step, by name and in the same order on every rank; those that this rank
    is not in are left out."""
    world = dist.group.WORLD
    assert world is not None
    yield "world", world
    yield "tensor", mpu.get_tensor_model_parallel_group()
    yield "pipeline", mpu.get_pipeline_model_parallel_group()
    yield "data", mpu.get_data_parallel_group(with_context_parallel=True)
    yield "model", mpu.get_model_parallel_group()
    yield "optimizer", mpu.get_intra_distributed_optimizer_instance_group()  # norms under optimizer.sharding=megatron
    for name, get in (
        ("embedding", mpu.get_embedding_group),
        ("position embedding", mpu.get_position_embedding_group),
    ):
        group = get(check_initialized=False)
        if isinstance(group, dist.ProcessGroup):
            yield name, group


def _connect(device: torch.device) -> None:
    """Have NCCL make these groups' communicators now. It makes each with its first collective, and that of the gradient
    norm is the first of its group: after the passes of a step, when memory is fullest."""
    for _, group in groups_of_a_step():
        if group.size() > 1:
            dist.all_reduce(torch.zeros(1, device=device), group=group)


def stop() -> None:
    """Leave every group, end its threads, and let go of the boxes that its ranks shared.

    A group lives until nothing refers to it, and a model that does refers to itself in cycles. Gloo's threads of a
    group whose peers have gone never sleep again: a dozen of them take a core.
    """
    shared_box.forget_all()
    mpu.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()

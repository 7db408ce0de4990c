# SPDX-License-Identifier: Apache-2.0
"""What would end a run later, and is cheap to find before: every rank looks, all ranks hear, one line says it.

It runs when the groups stand and nothing big is allocated. Each failure is one line, the same on all ranks.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from lora_megatron import __version__
from lora_megatron.checkpoint.state import checkpoints
from lora_megatron.config import Config
from lora_megatron.data.parquet import ExampleTable
from lora_megatron.errors import CheckpointError, ConfigError, DataError
from lora_megatron.measure.units import show_bytes, show_count
from lora_megatron.methods.method import Method
from lora_megatron.model.shape import ModelShape
from lora_megatron.parallel.agree import device_for_collectives, gather_text, require_equal, together
from lora_megatron.parallel.free_memory import available_host_memory, free_for_this_rank, free_memory
from lora_megatron.parallel.groups import groups_of_a_step
from lora_megatron.parallel.hang import show_ranks
from lora_megatron.planning.memory import MemoryPlan, locked_by_this_rank, plan_this_rank
from lora_megatron.planning.recompute import settle_here
from lora_megatron.planning.stages import chunk_layers

PLAN_TOLERANCE = 1.1
"""How far the plan's peak may be off: what exceeds the free memory by less is only warned of."""
_KINDS_NAMED = 3
_LARGEST = ("frozen_weights", "trained_weights", "gradients", "optimizer", "activations", "logits", "workspace")


@dataclass(frozen=True)
class Memory:
    """What a rank needs, and what is free where it runs (None: the system does not tell)."""

    host: str
    device: str
    persistent: int
    allocated: int
    largest: str
    free: int | None


def preflight(
    config: Config,
    shape: ModelShape,
    method: Method,
    tables: dict[str, ExampleTable | None],
    say: Callable[[str], None],
) -> list[str]:
    """Check devices, code, groups, memory and data; what was found, for `say_ready`. Collective.

    Raises:
        ConfigError: ranks with other devices or other code, a collective that counts wrong, too little memory.
        DataError: a rank cannot read the data.
    """
    require_equal("the code", code_version())
    groups = check_groups()
    plan = plan_this_rank(config, shape, method)
    memory = [Memory(**json.loads(text)) for text in gather_text(json.dumps(asdict(_own_memory(plan))))]
    devices = check_devices([rank.device for rank in memory])
    room = check_memory(memory, say)
    if config.base.transposes == "host":
        own = socket.gethostname(), locked_by_this_rank(config, shape, method), available_host_memory()
        warn_of_locked_memory([Locked(*json.loads(text)) for text in gather_text(json.dumps(own))], say)
    return [devices, f"groups {', '.join(groups)} ok", room, check_data(tables)]


def code_version() -> str:
    """The versions that have to be the same, and a hash of this package's own source."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    versions = f"torch {torch.__version__}, megatron-core {metadata.version('megatron-core')}"
    return f"lora-megatron {__version__} (source {digest.hexdigest()[:12]}), {versions}"


def check_groups() -> list[str]:
    """Names of the groups this rank is in with others, or of the world; each has added up numbers rightly."""
    ranks_checked = []
    for name, group in groups_of_a_step():
        members = dist.get_process_group_ranks(group)
        total = torch.tensor(dist.get_rank() + 1.0, device=device_for_collectives())
        dist.all_reduce(total, group=group)
        expected = sum(rank + 1 for rank in members)
        if float(total) != expected:
            raise ConfigError(
                f"the {name} group ({show_ranks(members)}) adds up to {float(total):g} and not {expected}: its network "
                "or library is broken; try NCCL_DEBUG=INFO, or another machine"
            )
        if len(members) > 1:
            ranks_checked.append(name)
    return ranks_checked or ["of one"]


def check_devices(devices: list[str]) -> str:
    """All ranks have the same device: the slowest sets the pace, and other hardware rounds otherwise."""
    count = Counter(devices)
    if len(count) > 1:
        usual = count.most_common(1)[0][0]
        others = [rank for rank, device in enumerate(devices) if device != usual]
        raise ConfigError(
            f"{show_ranks(others)} trains on {devices[others[0]]}, the others on {usual}: give every rank the same "
            "device, or take those machines out of the job"
        )
    return f"{len(devices)} x {devices[0]}"


def _own_memory(plan: MemoryPlan) -> Memory:
    by_kind = sorted(((getattr(plan, kind), kind) for kind in _LARGEST), reverse=True)[:_KINDS_NAMED]
    largest = ", ".join(f"{kind.replace('_', ' ')} {show_bytes(size)}" for size, kind in by_kind if size)
    device = "cpu"
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        device = f"{gpu.name} (compute capability {gpu.major}.{gpu.minor})"
    return Memory(socket.gethostname(), device, plan.persistent, plan.allocated, largest, free_memory())


def settle_recomputation(config: Config, shape: ModelShape, method: Method, say: Callable[[str], None]) -> Config:
    """`config` with `train.recompute = auto` made what the memory that is free here allows; collective."""
    settled = settle_here(config, shape, method, free=free_for_this_rank())
    if config.train.recompute == "auto":
        share = f"{settled.train.recompute_layers or 0} of the {chunk_layers(config, shape)} layers"
        share = f"fc1's output in {share}" if settled.train.recompute == "selective" else share
        say(f"train.recompute = auto recomputes {share} of each model chunk")
    return settled


def check_memory(ranks: list[Memory], say: Callable[[str], None]) -> str:
    """The plan fits into what is free: each rank into its GPU, on CPUs the ranks of a machine together."""
    shown, tightest = "memory not known", 0.0
    for place, here in _places(ranks).items():
        free = min((ranks[rank].free for rank in here), key=lambda value: value or 0)
        if free is None:
            continue
        persistent, planned = (sum(getattr(ranks[rank], kind) for rank in here) for kind in ("persistent", "allocated"))
        text = (
            f"{place} needs about {show_bytes(planned)} by the plan ({ranks[here[0]].largest}"
            f"{' on each' if len(here) > 1 else ''}) and {show_bytes(free)} are free"
        )
        remedy = "`lora-megatron plan` names layouts that fit; or free the memory, or lower data.micro_batch_size"
        if persistent > free or planned > PLAN_TOLERANCE * free:
            raise ConfigError(f"{text}: {remedy}")
        if planned > free:
            say(f"warning: {text}, which is close: {remedy}")
        if planned / free >= tightest:
            shown, tightest = f"memory {show_bytes(planned)} planned of {show_bytes(free)} free", planned / free
    return shown


class Locked(NamedTuple):
    """What a rank will lock of its host's memory, and what of that new processes can have, in bytes."""

    host: str
    size: int
    available: int | None


def warn_of_locked_memory(ranks: list[Locked], say: Callable[[str], None]) -> None:
    """Of each host that has not enough: a warning, as a virtual machine may grow with what is asked of it."""
    for host in dict.fromkeys(rank.host for rank in ranks):
        here = [rank for rank in ranks if rank.host == host]
        size = sum(rank.size for rank in here)
        available = min((rank.available for rank in here if rank.available is not None), default=size)
        if size > available:
            say(
                f"warning: base.transposes = host locks {show_bytes(size)} of machine {host}'s memory, and "
                f"{show_bytes(available)} are available: set base.transposes=group, or give the job more"
            )


def _places(ranks: list[Memory]) -> dict[str, list[int]]:
    """Ranks by whose memory they share."""
    places: dict[str, list[int]] = {}
    for rank, memory in enumerate(ranks):
        place = f"rank {rank}" if memory.device != "cpu" else memory.host
        places.setdefault(place, []).append(rank)
    return {f"machine {place}" if ranks[here[0]].device == "cpu" else place: here for place, here in places.items()}


def check_data(tables: dict[str, ExampleTable | None]) -> str:
    """Every rank reads the first and the last row of each file."""

    def read() -> list[str]:
        rows = []
        for key, table in tables.items():
            if table is None:
                continue
            try:
                table[0], table[len(table) - 1]
            except IndexError:
                raise DataError(f"{key} = {table.path} has no rows") from None
            rows.append(show_count(len(table)))
        return rows

    counts = together(read)
    return f"{' + '.join(counts)} row{'' if counts == ['1'] else 's'} read"


def check_disk(config: Config, checkpoint: int) -> str:
    """There is room for one checkpoint (its bytes) more than are kept; for the rank that writes.

    Raises:
        CheckpointError: there is not. Quotas of a user cannot be seen.
    """
    run, keep = Path(config.run.dir), max(2, config.train.keep_checkpoints)
    if not config.train.save_every:
        keep = 1  # the last step's, and one more if a signal comes before
    keep += config.train.best != "none"  # the best, the one it displaces and the one being written are smaller together
    have = sum(file.stat().st_size for folder in checkpoints(run) for file in folder.iterdir())
    needed = max(0, (keep + 1) * checkpoint - have)
    free = shutil.disk_usage(run).free
    if needed > free:
        remedy = ", or lower train.keep_checkpoints" if keep > 2 else ""
        raise CheckpointError(
            f"run.dir = {run} has {show_bytes(free)} free, and {keep + 1} checkpoints of {show_bytes(checkpoint)} need "
            f"{show_bytes(needed)} more: free some space or choose another run.dir{remedy}"
        )
    return f"checkpoints {show_bytes(needed)} of {show_bytes(free)} disk"

# SPDX-License-Identifier: Apache-2.0
"""Agree, then act: what one rank met, all ranks know before any of them goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from lora_megatron import errors
from lora_megatron.errors import UserError
from lora_megatron.parallel.heartbeat import beat

T = TypeVar("T")


def device_for_collectives() -> torch.device:
    """The device the default group's backend moves tensors on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def is_main() -> bool:
    """Whether this process is rank 0 (or in no world at all): the one that speaks."""
    return not dist.is_initialized() or dist.get_rank() == 0


def gather_text(text: str) -> list[str]:
    """Every rank's `text`, in rank order, on every rank (UTF-8 bytes; nothing is pickled)."""
    device = device_for_collectives()
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    size = torch.tensor([data.numel()], dtype=torch.int64, device=device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    longest = max(int(s) for s in sizes)
    padded = torch.zeros(max(longest, 1), dtype=torch.uint8, device=device)
    padded[: data.numel()] = data
    texts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(texts, padded)
    beat()
    return [bytes(t[: int(s)].tolist()).decode() for t, s in zip(texts, sizes, strict=True)]


def together(action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it failed for a user's reason on any, raise the same error on all.

    The first failing rank's error wins, so that every rank ends with the same message and exit status.
    """
    result: T | None = None
    failure: UserError | None = None
    try:
        result = action()
    except UserError as error:
        failure = error
    except OSError as error:  # a full disk or a vanished directory is the user's to mend, not a traceback
        failure = errors.CheckpointError(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
    report = json.dumps([type(failure).__name__, str(failure)]) if failure else ""
    reports = gather_text(report)
    for rank, text in enumerate(reports):
        if text:
            name, message = json.loads(text)
            suffix = f" (on rank {rank})" if set(reports) != {text} and "(on rank" not in message else ""
            raise getattr(errors, name, UserError)(message + suffix) from failure
    return result  # type: ignore[return-value]  # None only after a failure, and every failure has been raised above


def require_equal(what: str, value: str) -> None:
    """Raise ConfigError unless every rank holds the same `value` (a hash, a version)."""
    values = gather_text(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise errors.ConfigError(
                f"{what} differs between ranks: rank 0 has {values[0]!r}, rank {rank} has {other!r}; "
                "give every rank the same files and the same version"
            )

# SPDX-License-Identifier: Apache-2.0
"""Which rank a job hangs on, from the last sign of life of each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

LOCAL_PHASES = ("data",)
"""Phases in which a rank waits for no other: one that stands in them keeps the others waiting."""
_MOST_PLACES = 8


@dataclass(frozen=True)
class Peer:
    """What a rank says of itself, and when (monotonic seconds of the reader) it last said something new."""

    tick: int
    step: int
    count: int
    phase: str
    changed: float
    age: float = 0.0
    """Seconds since its last sign of progress, when it said so."""

    @property
    def place(self) -> str:
        """`step 4, model`."""
        return f"step {self.step}, {self.phase}"


def speaker(alive: Collection[int]) -> int:
    """The one rank that tells: the first of those that run."""
    return min(alive)


def explain_hang(
    peers: Mapping[int, Peer], alive: Collection[int], *, world_size: int, seconds: float, in_order: bool
) -> str:
    """One line that names the ranks the job hangs on and the place of each rank."""
    return (
        f"no progress for {seconds / 60:.3g} min: {_blame(peers, alive, world_size, in_order=in_order)}; "
        f"last: {_places(peers, world_size)}"
    )


def _blame(peers: Mapping[int, Peer], alive: Collection[int], world_size: int, *, in_order: bool) -> str:
    if silent := [rank for rank in range(world_size) if rank not in alive]:
        verb = "does" if len(silent) == 1 else "do"
        return f"{show_ranks(silent)} {verb} not run (stopped, killed, or the machine is gone)"
    if not peers:
        return "the disk of run.dir does not answer"
    done = {rank: (peer.step, peer.count if in_order else 0) for rank, peer in peers.items()}
    behind = [rank for rank in done if done[rank] == min(done.values())]
    if len(behind) == len(done):
        local = [rank for rank, peer in peers.items() if peer.phase in LOCAL_PHASES]
        behind = local or behind
    if len(behind) == world_size > 1:
        return "no rank is behind the others: their stacks tell what they wait for"
    verb = "hangs" if len(behind) == 1 else "hang"
    return f"{show_ranks(behind)} {verb} in {' or '.join(sorted({peers[rank].place for rank in behind}))}"


def _places(peers: Mapping[int, Peer], world_size: int) -> str:
    ranks_at: dict[str, list[int]] = {}
    for rank in range(world_size):
        place = peers[rank].place if rank in peers else "nothing known"
        ranks_at.setdefault(place, []).append(rank)
    texts = [f"{show_ranks(ranks)} in {place}" for place, ranks in ranks_at.items()]
    rest = [f"and {len(texts) - _MOST_PLACES} other places"] if len(texts) > _MOST_PLACES else []
    return ", ".join([*texts[:_MOST_PLACES], *rest])


def show_ranks(ranks: Collection[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], rank]
        else:
            spans.append([rank])
    texts = ["-".join(map(str, span)) for span in spans]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(texts)}"
